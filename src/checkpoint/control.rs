//! What a query and its operator tell each other through the checkpoint: `control/held-<batch>.json`, by the query, that it
//! holds the batch back; `control/resume-<batch>.json`, by a person, that this very plan is to be committed nevertheless, and
//! `control/drop-<batch>.json`, that the query may go on after this batch without the open windows of some tables. And what a
//! query tells its next attempt: `control/unknown-<batch>.json`, which schema ids the registry did not know.
//!
//! Owns: the four files. Does not own: when a batch is held back, or what an unknown id means. Like every other file of a checkpoint they are created if
//! absent and never edited; they go when the logs of their batch go.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::error::Error;
use super::files::{Created, Files};
use super::logs::LoggedPlan;
use crate::batch::BatchId;

/// A batch that was executed and not committed, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Held {
    pub batch: BatchId,
    pub plan_digest: String,
    pub reason: String,
    pub held_at: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Resume {
    batch: BatchId,
    plan_digest: String,
}

/// With it, an execution of the batch depends on nothing that could be another way the next time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Unknown {
    batch: BatchId,
    plan_digest: String,
    schema_ids: BTreeSet<u32>,
}

/// The tables whose open windows need not be kept after the batch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Drop {
    batch: BatchId,
    tables: BTreeSet<String>,
}

fn name(kind: &str, batch: BatchId) -> String {
    format!("control/{kind}-{batch:020}.json")
}

fn batch_of(file: &str) -> Option<BatchId> {
    let (_, digits) = file.strip_prefix("control/")?.strip_suffix(".json")?.rsplit_once('-')?;
    digits.parse().ok()
}

/// The first reason stays: what is there already says the same of the same plan.
pub(super) async fn hold(files: &Files, held: &Held) -> Result<(), Error> {
    let file = name("held", held.batch);
    files.create(&file, &files.encode(&file, held)?).await.map(|_| ())
}

pub(super) async fn held(files: &Files, plan: &LoggedPlan) -> Result<Option<Held>, Error> {
    let found: Option<(Held, _)> = files.read_json(&name("held", plan.plan.batch)).await?;
    Ok(found.map(|(held, _)| held).filter(|held| held.plan_digest == plan.digest))
}

pub(super) async fn resume(files: &Files, plan: &LoggedPlan) -> Result<(), Error> {
    let file = name("resume", plan.plan.batch);
    let resume = Resume { batch: plan.plan.batch, plan_digest: plan.digest.clone() };
    match files.create(&file, &files.encode(&file, &resume)?).await? {
        Created::Ours => Ok(()),
        Created::Theirs(_) => Err(files.damaged(&file, "it names another plan than the one that is logged")),
    }
}

pub(super) async fn is_resumed(files: &Files, batch: BatchId, plan_digest: &str) -> Result<bool, Error> {
    let found: Option<(Resume, _)> = files.read_json(&name("resume", batch)).await?;
    Ok(found.is_some_and(|(resume, _)| resume.batch == batch && resume.plan_digest == plan_digest))
}

/// False when another execution of the batch has logged other ids: this one must not be committed.
pub(super) async fn log_unknown_ids(
    files: &Files,
    batch: BatchId,
    plan_digest: &str,
    schema_ids: BTreeSet<u32>,
) -> Result<bool, Error> {
    let file = name("unknown", batch);
    let ours = Unknown { batch, plan_digest: plan_digest.to_string(), schema_ids };
    Ok(match files.create(&file, &files.encode(&file, &ours)?).await? {
        Created::Ours => true,
        Created::Theirs(bytes) => files.decode::<Unknown>(&file, &bytes)? == ours,
    })
}

pub(super) async fn unknown_ids(
    files: &Files,
    batch: BatchId,
    plan_digest: &str,
) -> Result<Option<BTreeSet<u32>>, Error> {
    let file = name("unknown", batch);
    match files.read_json::<Unknown>(&file).await? {
        Some((found, _)) if found.plan_digest != plan_digest => {
            Err(files.damaged(&file, "it names another plan than the one that is logged"))
        }
        found => Ok(found.map(|(found, _)| found.schema_ids)),
    }
}

/// Of two people the first has said it: if it was about other tables, the second hears of it.
pub(super) async fn agree_to_drop(files: &Files, batch: BatchId, tables: &BTreeSet<String>) -> Result<(), Error> {
    let file = name("drop", batch);
    let ours = Drop { batch, tables: tables.clone() };
    if let Created::Theirs(bytes) = files.create(&file, &files.encode(&file, &ours)?).await? {
        let found: Drop = files.decode(&file, &bytes)?;
        if !tables.is_subset(&found.tables) {
            let agreed: Vec<&str> = found.tables.iter().map(String::as_str).collect();
            return Err(files.refused(format!(
                "{file} is there and says that the open windows of {} may be dropped, and of no other table; delete that \
                 file to agree to something else",
                agreed.join(", ")
            )));
        }
    }
    Ok(())
}

pub(super) async fn agreed_to_drop(files: &Files, batch: BatchId, tables: &BTreeSet<String>) -> Result<bool, Error> {
    let found: Option<(Drop, _)> = files.read_json(&name("drop", batch)).await?;
    Ok(found.is_some_and(|(found, _)| found.batch == batch && tables.is_subset(&found.tables)))
}

/// Files of batches before `keep_from`.
pub(super) async fn outdated(files: &Files, keep_from: BatchId) -> Result<Vec<String>, Error> {
    let all = files.list("control").await?.into_iter().map(|entry| entry.file);
    Ok(all.filter(|file| batch_of(file).is_some_and(|batch| batch < keep_from)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_their_batch() {
        assert_eq!(name("held", 7), "control/held-00000000000000000007.json");
        assert_eq!(batch_of(&name("resume", 12)), Some(12));
        assert_eq!(batch_of("control/notes.txt"), None);
    }
}
