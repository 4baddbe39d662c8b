//! The description of the API: OpenAPI from the handlers' types, and the pages that show it without a network.

use axum::Router;
use axum::http::StatusCode;
use axum::response::Html;
use axum::routing::get;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::openapi::{
    Components, Content, Info, OpenApi, OpenApiBuilder, Ref, RefOr, ResponseBuilder, SecurityRequirement,
};
use utoipa::{PartialSchema, ToSchema};
use utoipa_swagger_ui::{Config, SwaggerUi};

use super::codes;
use super::problem::{FieldError, ProblemDocument};
use crate::app::AppState;

const BEARER: &str = "token";

/// What the description says about the whole API.
pub(super) fn frame() -> OpenApi {
    let info = Info::builder()
        .title("Blockyard")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "Backs up all disks of a virtual machine from one snapshot. Times are UTC, sizes are bytes. Every answer that \
             is no success is a problem document; `/docs/problems` lists the codes.",
        ))
        .build();
    let mut components = Components::new();
    components.add_security_scheme(BEARER, SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
    components.schemas.insert(FieldError::name().into_owned(), FieldError::schema());
    components.schemas.insert(ProblemDocument::name().into_owned(), ProblemDocument::schema());
    OpenApiBuilder::new()
        .info(info)
        .components(Some(components))
        .security(Some([SecurityRequirement::new(BEARER, Vec::<String>::new())]))
        .build()
}

/// Adds to every operation what all have in common: the problem document as the answer for anything but success.
pub(super) fn complete(openapi: &mut OpenApi) {
    let schema = RefOr::Ref(Ref::from_schema_name(ProblemDocument::name()));
    let problem = ResponseBuilder::new()
        .description("A problem document")
        .content("application/problem+json", Content::new(Some(schema)))
        .build();
    for item in openapi.paths.paths.values_mut() {
        let operations = [&mut item.get, &mut item.put, &mut item.post, &mut item.delete];
        for operation in operations.into_iter().flatten() {
            for (status, response) in &mut operation.responses.responses {
                if let RefOr::T(response) = response
                    && response.description.is_empty()
                {
                    // The standard demands a text, and the words of the status say all there is to say.
                    let reason = status.parse().ok().and_then(|status: StatusCode| status.canonical_reason());
                    response.description = reason.unwrap_or("Success").to_owned();
                }
            }
            operation.responses.responses.insert("default".to_owned(), RefOr::T(problem.clone()));
        }
    }
}

/// `/openapi.json`, `/docs` and `/docs/problems`.
pub(super) fn pages(openapi: OpenApi) -> Router<AppState> {
    let config = Config::new(["/openapi.json"]).try_it_out_enabled(true);
    Router::new()
        .route("/docs/problems", get(|| async { Html(codes::html()) }))
        .merge(SwaggerUi::new("/docs").url("/openapi.json", openapi).config(config))
}
