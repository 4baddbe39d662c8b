//! `blockyard repo prune` and `repo retention`, and the rules as options of `repo add`.

use clap::Args;
use serde_json::{Map, Value, json};

use super::client::Client;
use super::size::readable;
use super::vm::text;
use super::{CliError, Exit, Output, table};
use crate::id::RepositoryId;

/// Which restore points are kept: the newest ones, and the newest one of each of so many hours, days, … that have one.
#[derive(Debug, Default, Args)]
pub(super) struct Rules {
    /// Keep the newest N points of each VM.
    #[arg(long, value_name = "N")]
    keep_last: Option<u32>,
    /// Keep the newest point of each of the last N hours that have one.
    #[arg(long, value_name = "N")]
    keep_hourly: Option<u32>,
    /// The same for days.
    #[arg(long, value_name = "N")]
    keep_daily: Option<u32>,
    /// The same for weeks, which begin on Monday.
    #[arg(long, value_name = "N")]
    keep_weekly: Option<u32>,
    /// The same for months.
    #[arg(long, value_name = "N")]
    keep_monthly: Option<u32>,
    /// The same for years.
    #[arg(long, value_name = "N")]
    keep_yearly: Option<u32>,
}

impl Rules {
    /// The rules as the API takes them; empty when none was given.
    pub(super) fn document(&self) -> Map<String, Value> {
        let rules = [
            ("keep_last", self.keep_last),
            ("keep_hourly", self.keep_hourly),
            ("keep_daily", self.keep_daily),
            ("keep_weekly", self.keep_weekly),
            ("keep_monthly", self.keep_monthly),
            ("keep_yearly", self.keep_yearly),
        ];
        rules.into_iter().filter_map(|(name, count)| Some((name.to_owned(), count?.into()))).collect()
    }
}

#[derive(Debug, Args)]
pub(super) struct Retention {
    /// Id of the repository.
    id: String,
    /// Remove all rules: nothing is deleted by itself.
    #[arg(long, conflicts_with_all = ["keep_last", "keep_hourly", "keep_daily", "keep_weekly", "keep_monthly", "keep_yearly"])]
    keep_all: bool,
    #[command(flatten)]
    rules: Rules,
}

#[derive(Debug, Args)]
pub(super) struct Prune {
    /// Id of the repository.
    id: String,
    /// Delete; without it is only told what would be deleted.
    #[arg(long)]
    apply: bool,
}

/// Shows the rules of a repository, or replaces all of them by those that were given.
pub(super) async fn retention(client: &Client, wanted: &Retention, output: &Output) -> Result<Exit, CliError> {
    let path = path_of(&wanted.id)?;
    let rules = wanted.rules.document();
    if rules.is_empty() && !wanted.keep_all {
        output.answer(&client.get(&path, &[]).await?["retention"], render_rules)?;
        return Ok(Exit::Ok);
    }
    let fields = ["name", "path", "enabled", "max_running"];
    let changed = client.replace(&path, |repository| {
        let mut body: Map<String, Value> = fields
            .into_iter()
            .filter(|field| !repository[field].is_null())
            .map(|field| (field.to_owned(), repository[field].clone()))
            .collect();
        body.insert("retention".to_owned(), rules.into());
        body.into()
    });
    output.done(&changed.await?, |repository| {
        format!("{}: {}", text(&repository["id"]), render_rules(&repository["retention"]))
    })?;
    Ok(Exit::Ok)
}

/// Tells what the rules say of every point, and does it when that was asked for.
pub(super) async fn prune(client: &Client, wanted: &Prune, output: &Output) -> Result<Exit, CliError> {
    let dry_run = if wanted.apply { "false" } else { "true" };
    let path = format!("{}/prune", path_of(&wanted.id)?);
    let answer = client.post_at_length(&path, &[("dry_run", dry_run)], &json!({})).await?;
    output.answer(&answer, render_prune)?;
    Ok(if answer["failed"] == 0 { Exit::Ok } else { Exit::Warnings })
}

/// The path of a repository. An id is one step of it; whatever else was written names no repository.
pub(super) fn path_of(id: &str) -> Result<String, CliError> {
    match id.parse::<RepositoryId>() {
        Ok(id) => Ok(format!("/repositories/{id}")),
        Err(_) => Err(CliError::NotFound { noun: "repository", name: id.to_owned() }),
    }
}

fn render_rules(rules: &Value) -> String {
    let rules = rules.as_object().into_iter().flatten();
    let words: Vec<String> = rules.map(|(name, count)| format!("--{} {count}", name.replace('_', "-"))).collect();
    if words.is_empty() { "everything is kept".to_owned() } else { words.join(" ") }
}

fn render_prune(answer: &Value) -> String {
    let points = answer["points"].as_array().map(Vec::as_slice).unwrap_or_default();
    let rows: Vec<Vec<String>> = points
        .iter()
        .map(|point| {
            let reasons = point["reasons"].as_array().map(Vec::as_slice).unwrap_or_default();
            let mut why: Vec<String> = reasons.iter().map(|reason| text(reason).to_owned()).collect();
            why.extend(point["merged_into"].as_str().map(|into| format!("into {into}")));
            why.extend(point["error"].as_str().map(|error| format!("NOT DONE: {error}")));
            let [id, vm, at, decision] =
                ["point_id", "vm", "committed_at", "decision"].map(|field| text(&point[field]).to_owned());
            let frees = point["frees_bytes"].as_u64().filter(|bytes| *bytes > 0).map_or("-".to_owned(), readable);
            vec![id, vm, at, decision, frees, why.join(", ")]
        })
        .collect();
    let number = |field: &str| answer[field].as_u64().unwrap_or(0);
    let (kept, deleted, merged) = (number("kept"), number("deleted"), number("merged"));
    let freed = readable(number("frees_bytes"));
    let total = if answer["dry_run"] == false {
        format!("{kept} kept, {deleted} deleted, {merged} merged, {freed} freed")
    } else {
        format!("{kept} to keep, {deleted} to delete, {merged} to merge, up to {freed} to free; --apply does it")
    };
    let failed = match number("failed") {
        0 => String::new(),
        failed => format!("; {failed} could not go"),
    };
    let table = table::render(&["point", "vm", "committed", "decision", "frees", "reasons"], &rows);
    format!("{table}\n\n{total}{failed}")
}
