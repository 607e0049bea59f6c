//! `floe plan`: what has changed since the checkpoint was written, what each change comes to, and whether `floe run` would go on.
//!
//! It changes nothing; with `--apply` it writes one file into the checkpoint, which says that the state of windows that are
//! no longer there, or are others now, may be dropped. The judgement is [`crate::query::changes`] and the sink's: the same that a run acts on.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::json;
use uuid::Uuid;

use super::{Error, beside};
use crate::checkpoint::{Checkpoint, Recovered};
use crate::config::Config;
use crate::error::Error as QueryError;
use crate::pipeline::Pipeline;
use crate::query::changes::{self, Change, Changes, Verdict};
use crate::sink::iceberg::{IcebergSink, TablePlan, TableStep};

/// What there is to say, and whether a run would go on.
pub struct Plan {
    pub text: String,
    pub goes_on: bool,
}

pub async fn plan(config: &Config, as_json: bool, apply: bool) -> Result<Plan, Error> {
    let pipeline = Pipeline::compile(config).map_err(|p| QueryError::Compile(p.join("\n")))?;
    let location = crate::storage::open(&config.checkpoint_location).map_err(QueryError::from)?;
    let url = location.url.clone();
    let mut changes = Changes::default();
    let mut known = BTreeMap::new();
    if Checkpoint::inspect(location.clone()).await.map_err(QueryError::from)?.is_some() {
        let checkpoint = Arc::new(Checkpoint::open(location, &config.name).await.map_err(QueryError::from)?);
        let assess = async |recovered: &Recovered| changes::assess(config, &pipeline, &checkpoint, recovered).await;
        let (recovered, found) = beside::read(&checkpoint, assess).await?;
        known = recovered.plan.map(|logged| logged.plan.tables).unwrap_or_default();
        changes = found;
        let only_drops = changes.obstacles().all(|change| change.verdict != Verdict::Refused);
        if let (true, true, Some(batch)) = (apply, only_drops && !changes.drops.is_empty(), changes.since) {
            checkpoint.agree_to_drop(batch, &changes.drops).await.map_err(QueryError::from)?;
            changes.agreed = true;
        }
    }
    let tables = IcebergSink::plan(&config.catalog, &pipeline.tables).await.map_err(QueryError::from)?;
    changes.list.extend(tables.iter().filter_map(|table| judge(table, &known)));
    let goes_on = changes.obstacles().next().is_none();
    let text = if as_json { as_object(config, &url, &changes, goes_on) } else { text(config, &url, &changes, goes_on) };
    Ok(Plan { text, goes_on })
}

/// None: it fits as it is. `known` are the tables that the newest batch was planned for.
fn judge(table: &TablePlan, known: &BTreeMap<String, Uuid>) -> Option<Change> {
    let subject = format!("table {}", table.table);
    let change = match &table.step {
        TableStep::Keep => return None,
        TableStep::Create if known.contains_key(&table.table) => {
            let why = "the checkpoint has written to it and the catalog does not know it: what it held is gone. Restore it, set \
                       [catalog] back, or start over with a new checkpoint and new tables";
            Change::new(subject, "missing", Verdict::Refused, why)
        }
        TableStep::Create => Change::new(subject, "new", Verdict::Safe, "it is created"),
        TableStep::Evolve(_) => Change::new(subject, "other columns", Verdict::Safe, table.to_string()),
        TableStep::Refuse(why) => Change::new(subject, "does not fit", Verdict::Refused, why.clone()),
    };
    Some(change)
}

fn text(config: &Config, url: &str, changes: &Changes, goes_on: bool) -> String {
    let mut text = match changes.since {
        Some(batch) => format!("{}: changes since batch {batch} of {url}\n\n", config.name),
        None => {
            format!("{}: no batch is committed yet at {url}; everything begins with the first run\n\n", config.name)
        }
    };
    for change in &changes.list {
        text.push_str(&format!("{change}\n"));
    }
    if changes.list.is_empty() {
        text.push_str("nothing has changed\n");
    }
    if changes.agreed {
        let tables: Vec<&str> = changes.drops.iter().map(String::as_str).collect();
        text.push_str(&format!("\nagreed: the open windows of {} are dropped at the next start", tables.join(", ")));
    }
    text.push_str(if goes_on { "\nfloe run goes on" } else { "\nfloe run refuses to start (exit code 3)" });
    text
}

fn as_object(config: &Config, url: &str, changes: &Changes, goes_on: bool) -> String {
    let object = json!({
        "pipeline": config.name, "checkpoint": url, "since_batch": changes.since, "goes_on": goes_on,
        "agreed_to_drop": if changes.agreed { changes.drops.iter().cloned().collect() } else { Vec::<String>::new() },
        "changes": changes.list,
    });
    object.to_string()
}
