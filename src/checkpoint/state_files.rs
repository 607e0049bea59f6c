//! State files: the bytes that [`crate::state`] makes durable, and the purge of everything that no batch needs any more.
//!
//! Owns: names, checksums and lifetime. Does not own: what is inside. A state file exists for the query only once a commit
//! log entry names it; until then it belongs to the attempt in its name.

use std::collections::BTreeSet;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::control;
use super::error::Error;
use super::files::{Created, Files, numbered};
use super::logs::CommitEntry;
use crate::batch::BatchId;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateKind {
    /// Partial aggregates of one batch.
    Delta,
    /// Several deltas merged into one.
    Run,
}

/// A state file as the commit log names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateFile {
    /// Relative to the checkpoint: `state/<batch>-<attempt>.delta` or `.run`.
    pub name: String,
    pub bytes: u64,
    pub crc32: u32,
    /// The file is of no use any more once the watermark has passed this; `None` when it holds no window.
    pub max_window_end_us: Option<i64>,
}

fn name(batch: BatchId, attempt: Uuid, kind: StateKind) -> String {
    let extension = match kind {
        StateKind::Delta => "delta",
        StateKind::Run => "run",
    };
    format!("state/{batch:020}-{attempt}.{extension}")
}

fn batch_of(file: &str) -> Option<BatchId> {
    let name = file.strip_prefix("state/")?;
    if !name.ends_with(".delta") && !name.ends_with(".run") {
        return None;
    }
    name.split_once('-').filter(|(digits, _)| digits.len() == 20)?.0.parse().ok()
}

pub(super) async fn put(
    files: &Files,
    batch: BatchId,
    attempt: Uuid,
    kind: StateKind,
    bytes: Bytes,
    max_window_end_us: Option<i64>,
) -> Result<StateFile, Error> {
    let name = name(batch, attempt, kind);
    let (len, crc32) = (bytes.len() as u64, crc32fast::hash(&bytes));
    if let Created::Theirs(_) = files.create(&name, &bytes).await? {
        return Err(files.damaged(&name, "another file has the name of this attempt, which is unique"));
    }
    files.failpoint("state.after_put", &name)?;
    Ok(StateFile { name, bytes: len, crc32, max_window_end_us })
}

pub(super) async fn read(files: &Files, file: &StateFile) -> Result<Bytes, Error> {
    let logged_by = match batch_of(&file.name) {
        Some(batch) => format!("(state of batch {batch}, named by the newest commit log entry)"),
        None => "(named by the newest commit log entry)".to_string(),
    };
    let Some(bytes) = files.read(&file.name).await? else {
        return Err(files.damaged(&file.name, format!("the state file is missing {logged_by}")));
    };
    if bytes.len() as u64 != file.bytes {
        let problem = format!("the state file has {} bytes instead of {} {logged_by}", bytes.len(), file.bytes);
        return Err(files.damaged(&file.name, problem));
    }
    if crc32fast::hash(&bytes) != file.crc32 {
        return Err(files.damaged(&file.name, format!("the state file's bytes do not match its checksum {logged_by}")));
    }
    Ok(bytes)
}

/// Step 7. Deletes what nothing can need any more and returns how many files that were. Call it only after `commits/<newest>`
/// was logged by this process.
///
/// State of batches after `newest` stays: another process may be writing it. State of the commit before stays as well, so
/// that a copy of the checkpoint that is being made while a batch commits is complete.
///
/// A process that has a successor deletes nothing: it may have slept so long that its `commits/<newest>` was purged and it has
/// just logged another, so that files which it takes for leftovers are its successor's state. Without one, whoever claims
/// the next epoch will find the commit of this process, and every file that it names is kept.
pub(super) async fn purge(
    files: &Files,
    epoch: u64,
    newest: BatchId,
    retain: u64,
    live: &[StateFile],
) -> Result<u64, Error> {
    let owners = files.numbers("owners").await?;
    if owners.last().is_some_and(|owner| *owner > epoch) {
        return Ok(0);
    }
    let mut needed: BTreeSet<String> = live.iter().map(|file| file.name.clone()).collect();
    if let Some(before) = newest.checked_sub(1) {
        let entry: Option<(CommitEntry, _)> = files.read_json(&numbered("commits", before)).await?;
        needed.extend(entry.into_iter().flat_map(|(entry, _)| entry.state).map(|file| file.name));
    }
    let mut doomed = Vec::new();
    for entry in files.list("state").await? {
        if batch_of(&entry.file).is_some_and(|batch| batch <= newest) && !needed.contains(&entry.file) {
            doomed.push(entry.file);
        }
    }
    // Recovery reads two batches of the logs.
    let keep_from = (newest + 1).saturating_sub(retain.max(2));
    for folder in ["commits", "offsets"] {
        let old = files.numbers(folder).await?.into_iter().filter(|batch| *batch < keep_from);
        doomed.extend(old.map(|batch| numbered(folder, batch)));
    }
    doomed.extend(control::outdated(files, keep_from).await?);
    doomed.extend(owners.into_iter().filter(|owner| *owner < epoch).map(|owner| numbered("owners", owner)));
    for file in &doomed {
        files.delete(file).await?;
    }
    Ok(doomed.len() as u64)
}
