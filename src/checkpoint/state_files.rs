//! State files: the bytes that [`crate::state`] makes durable, and the purge of everything that no batch needs any more.
//!
//! Owns: names, checksums and lifetime. Does not own: what is inside. A state file exists for the query only once a commit
//! log entry names it; until then it belongs to the attempt in its name.

use std::collections::BTreeSet;
use std::ops::Range;

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
    /// Part of what several deltas were merged into.
    Run(u32),
}

/// A state file as the commit log names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateFile {
    /// Relative to the checkpoint: `state/<batch>-<attempt>.delta` or `state/<batch>-<attempt>-<part>.run`.
    pub name: String,
    pub bytes: u64,
    /// Of the file's index, which holds the checksums of everything else ([`crate::state`] checks them).
    pub crc32: u32,
    /// The file is of no use any more once the watermark has passed this; `None` when it holds no window.
    pub max_window_end_us: Option<i64>,
}

fn name(batch: BatchId, attempt: Uuid, kind: StateKind) -> String {
    let stem = stem(batch, attempt);
    match kind {
        StateKind::Delta => format!("{stem}.delta"),
        StateKind::Run(part) => format!("{stem}-{part}.run"),
    }
}

/// How the names of all files of an attempt begin.
pub(super) fn stem(batch: BatchId, attempt: Uuid) -> String {
    format!("state/{batch:020}-{attempt}")
}

fn batch_of(file: &str) -> Option<BatchId> {
    let name = file.strip_prefix("state/")?;
    if !name.ends_with(".delta") && !name.ends_with(".run") {
        return None;
    }
    name.split_once('-').filter(|(digits, _)| digits.len() == 20)?.0.parse().ok()
}

impl StateFile {
    pub fn is_run(&self) -> bool {
        self.name.ends_with(".run")
    }
}

pub(super) async fn put(
    files: &Files,
    batch: BatchId,
    attempt: Uuid,
    kind: StateKind,
    bytes: Bytes,
    crc32: u32,
    max_window_end_us: Option<i64>,
) -> Result<StateFile, Error> {
    let name = name(batch, attempt, kind);
    let len = bytes.len() as u64;
    if let Created::Theirs(_) = files.create(&name, &bytes).await? {
        return Err(files.damaged(&name, "another file has the name of this attempt, which is unique"));
    }
    files.failpoint("state.after_put", &name)?;
    Ok(StateFile { name, bytes: len, crc32, max_window_end_us })
}

/// Reads parts of a file, and before that, where `whole`, compares its length with the one that was logged.
pub(super) async fn read(
    files: &Files,
    file: &StateFile,
    ranges: &[Range<u64>],
    whole: bool,
) -> Result<Vec<Bytes>, Error> {
    let size = if whole { files.size(&file.name).await? } else { Some(file.bytes) };
    if size == Some(file.bytes)
        && let Some(parts) = files.read_ranges(&file.name, ranges).await?
    {
        return Ok(parts);
    }
    let logged_by = match batch_of(&file.name) {
        Some(batch) => format!("(state of batch {batch}, named by the newest commit log entry)"),
        None => "(named by the newest commit log entry)".to_string(),
    };
    let problem = match files.size(&file.name).await? {
        None => format!("the state file is missing {logged_by}"),
        Some(size) => format!("the state file has {size} bytes instead of {} {logged_by}", file.bytes),
    };
    Err(files.damaged(&file.name, problem))
}

/// Step 7. Deletes what nothing can need any more and returns how many files that were. Call it only after `commits/<newest>`
/// was logged by this process.
///
/// `in_use` are the beginnings of names that a compaction reads or writes: no commit may name them, or none any more.
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
    in_use: &[String],
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
        let needed = needed.contains(&entry.file) || in_use.iter().any(|name| entry.file.starts_with(name));
        if batch_of(&entry.file).is_some_and(|batch| batch <= newest) && !needed {
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
