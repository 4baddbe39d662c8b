//! What all lists have in common: `?limit=&page_token=`, `total` and `next_page_token`.

use std::fmt::Display;
use std::str::FromStr;

use super::problem::{Code, Problem};
use crate::store::{Listing, Page};

/// Rows of a page when the caller names no limit, and the most that one may ask for.
pub const LIMIT_MAX: u32 = 1000;

/// The page that `limit` and `page_token` of a query ask for.
///
/// # Errors
///
/// `invalid_field` for a limit outside 1 to 1000 or a token that this kind of list did not make.
pub fn page<K: FromStr>(limit: Option<u32>, page_token: Option<&str>) -> Result<Page<K>, Problem> {
    let limit = limit.unwrap_or(LIMIT_MAX);
    if !(1..=LIMIT_MAX).contains(&limit) {
        return Err(Problem::new(Code::InvalidField, format!("limit must be 1 to {LIMIT_MAX}, not {limit}.")));
    }
    let after = page_token
        .map(str::parse)
        .transpose()
        .map_err(|_| Problem::new(Code::InvalidField, "page_token is none that this list gave out."))?;
    Ok(Page { limit, after })
}

/// The token of the page behind this one; none on the last page.
pub fn next_page_token<T, K: Display>(listing: &Listing<T, K>) -> Option<String> {
    listing.next.as_ref().map(ToString::to_string)
}
