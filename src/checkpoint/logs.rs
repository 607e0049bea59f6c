//! The two logs around a batch: `offsets/<batch>.json` before it, `commits/<batch>.json` after it.
//!
//! Owns: what the entries say and which pairs of newest entries can exist. Does not own: planning or executing. Invariants:
//! an entry is created if absent and never edited; at most one batch is logged without its commit.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::error::Error;
use super::files::{Created, Files, digest, numbered};
use super::state_files::StateFile;
use super::windows::WindowStates;
use crate::batch::{BatchId, MicroBatch};
use crate::config::Definition;
use crate::window::reread::Reread;
use crate::window::watermark::EventTimeProgress;

/// A plan that is in the offset log.
#[derive(Clone, Debug, PartialEq)]
pub struct LoggedPlan {
    pub plan: MicroBatch,
    /// `sha256:<hex>` of the bytes of `offsets/<batch>.json`: what the tables' markers and the commit log repeat.
    pub digest: String,
    /// Those bytes.
    pub bytes: Bytes,
}

/// What became of the offsets of a batch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    /// Records read; fewer than offsets where transactions and compaction leave holes.
    pub records: u64,
    pub rows: u64,
    pub filtered: u64,
    /// Valid rows left out by an expectation with `on_fail = "drop"`.
    pub dropped: u64,
    /// By reason code. Those of records add up with rows, filtered and dropped to `records`; `overflow` and `data_loss` come on top.
    pub dead_letters: BTreeMap<String, u64>,
    /// Rows that failed an expectation, by its name; a row may fail several.
    pub expectations: BTreeMap<String, u64>,
    /// How often a row missed a window that was closed, by window table; a row of several windows may miss some of them.
    pub late: BTreeMap<String, u64>,
    /// Rows of closed windows, by window table.
    pub windows: BTreeMap<String, u64>,
    /// Rows whose event time is null: in no window.
    pub without_event_time: u64,
    /// Values that an aggregate or the filter of a window took as null because the expression failed on the row, as a
    /// division by zero does.
    pub failed_values: u64,
    /// The latest event time among the rows, late ones included.
    pub max_event_time_us: Option<i64>,
    /// Bytes of keys and values read; the next plan's `bytes_per_record` comes from here.
    pub bytes: u64,
}

impl Counts {
    /// Takes in what another worker of the same batch counted.
    pub fn add(&mut self, other: &Counts) {
        let merge = |into: &mut BTreeMap<String, u64>, from: &BTreeMap<String, u64>| {
            for (key, count) in from {
                *into.entry(key.clone()).or_default() += count;
            }
        };
        self.records += other.records;
        self.rows += other.rows;
        self.filtered += other.filtered;
        self.dropped += other.dropped;
        merge(&mut self.expectations, &other.expectations);
        merge(&mut self.dead_letters, &other.dead_letters);
        merge(&mut self.late, &other.late);
        merge(&mut self.windows, &other.windows);
        self.without_event_time += other.without_event_time;
        self.failed_values += other.failed_values;
        self.max_event_time_us = self.max_event_time_us.max(other.max_event_time_us);
        self.bytes += other.bytes;
    }
}

/// The batch is done: all its tables carry its marker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CommitEntry {
    pub batch: BatchId,
    /// The owner that executed it; may be higher than the one that planned it.
    pub epoch: u64,
    pub plan_digest: String,
    /// With `global-max` the next batch's watermark, with `partition-min` the least that it will be; None: not set yet.
    pub watermark_next_ms: Option<i64>,
    /// What each partition has shown so far; empty where there are no windows.
    #[serde(default, skip_serializing_if = "EventTimeProgress::is_empty")]
    pub event_times: EventTimeProgress,
    /// From where on the open windows could be aggregated again; None where there are no windows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reread: Option<Reread>,
    /// By which numbers the state files know the windows.
    #[serde(default, skip_serializing_if = "WindowStates::is_empty")]
    pub windows: WindowStates,
    /// What it was executed with.
    #[serde(default, skip_serializing_if = "Definition::is_empty")]
    pub definition: Definition,
    /// All files that make up the state after this batch.
    pub state: Vec<StateFile>,
    /// Snapshot of every table; `None` for one that the batch had nothing for.
    pub snapshots: BTreeMap<String, Option<i64>>,
    pub counts: Counts,
    pub committed_at_ms: i64,
    /// The topic that the batch's dead letters are owed to, once it is done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dead_letter_topic: Option<String>,
}

/// Where the query stands: nothing yet; a plan to replay (no commit of its number); or all done up to the plan.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recovered {
    /// The newest plan. To be replayed unless `commit` is of the same batch.
    pub plan: Option<LoggedPlan>,
    /// The newest commit, whose state is the state to start from.
    pub commit: Option<CommitEntry>,
}

impl Recovered {
    /// The plan that was logged and not committed.
    pub fn replay(&self) -> Option<&LoggedPlan> {
        let done = self.commit.as_ref().map(|commit| commit.batch);
        self.plan.as_ref().filter(|logged| done != Some(logged.plan.batch))
    }
}

/// Which newest entries can stand side by side. With "-" for none:
///
/// | newest plan | newest commit |                                             |
/// |-------------|---------------|---------------------------------------------|
/// | -           | -             | a new query                                 |
/// | 0           | -             | replay 0                                    |
/// | N           | N-1           | replay N                                    |
/// | N           | N             | N is done                                   |
/// | any other   |               | files are missing or from different copies  |
fn consistent(plan: Option<BatchId>, commit: Option<BatchId>) -> bool {
    match (plan, commit) {
        (None, None) => true,
        (Some(plan), None) => plan == 0,
        (Some(plan), Some(commit)) => commit == plan || commit.checked_add(1) == Some(plan),
        (None, Some(_)) => false,
    }
}

async fn newest(files: &Files) -> Result<(Option<BatchId>, Option<BatchId>), Error> {
    Ok((files.numbers("offsets").await?.last().copied(), files.numbers("commits").await?.last().copied()))
}

pub(super) async fn recover(files: &Files) -> Result<Recovered, Error> {
    let mut found = newest(files).await?;
    while !consistent(found.0, found.1) {
        // Another process may have moved on between the two listings: only what stays is a contradiction.
        let again = newest(files).await?;
        if again == found {
            return Err(contradiction(files, found));
        }
        found = again;
    }
    let plan = match found.0 {
        Some(batch) => Some(read_plan(files, batch).await?.ok_or_else(|| vanished(files, "offsets", batch))?),
        None => None,
    };
    let commit = match found.1 {
        Some(batch) => Some(read_commit(files, batch).await?.ok_or_else(|| vanished(files, "commits", batch))?),
        None => None,
    };
    if let Some(commit) = &commit {
        let planned = match &plan {
            Some(logged) if logged.plan.batch == commit.batch => Some(logged.digest.clone()),
            _ => read_plan(files, commit.batch).await?.map(|logged| logged.digest),
        };
        if planned.is_some_and(|digest| digest != commit.plan_digest) {
            let (plan, commit) = (numbered("offsets", commit.batch), numbered("commits", commit.batch));
            return Err(files.damaged(
                &commit,
                format!("it was written for another plan than {plan} is: the two files come from different copies"),
            ));
        }
    }
    Ok(Recovered { plan, commit })
}

fn contradiction(files: &Files, (plan, commit): (Option<BatchId>, Option<BatchId>)) -> Error {
    let show = |folder, batch: Option<BatchId>| match batch {
        Some(batch) => format!("the newest file in {folder}/ is {}", numbered(folder, batch)),
        None => format!("{folder}/ is empty"),
    };
    let file = match (plan, commit) {
        (_, Some(commit)) if plan.is_none_or(|plan| plan < commit) => numbered("offsets", commit),
        (Some(plan), _) => numbered("commits", plan.saturating_sub(1)),
        _ => "offsets/".to_string(),
    };
    let problem = format!(
        "the file is missing: {} and {}, but a plan is only logged once the batch before it is committed, and a commit only after its plan",
        show("offsets", plan),
        show("commits", commit)
    );
    files.damaged(&file, problem)
}

/// A file was listed and then not found: only a purge by a process that is far ahead does that.
fn vanished(files: &Files, folder: &str, batch: BatchId) -> Error {
    files.transient(
        &numbered(folder, batch),
        "it was listed and then gone: another process is at work on this checkpoint",
    )
}

async fn read_plan(files: &Files, batch: BatchId) -> Result<Option<LoggedPlan>, Error> {
    let file = numbered("offsets", batch);
    let Some((plan, bytes)) = files.read_json::<MicroBatch>(&file).await? else { return Ok(None) };
    if plan.batch != batch {
        return Err(files.damaged(&file, format!("it contains the plan of batch {}", plan.batch)));
    }
    Ok(Some(LoggedPlan { plan, digest: digest(&bytes), bytes }))
}

async fn read_commit(files: &Files, batch: BatchId) -> Result<Option<CommitEntry>, Error> {
    let file = numbered("commits", batch);
    let Some((commit, _)) = files.read_json::<CommitEntry>(&file).await? else { return Ok(None) };
    if commit.batch != batch {
        return Err(files.damaged(&file, format!("it contains the commit of batch {}", commit.batch)));
    }
    Ok(Some(commit))
}

/// Batches in a row, ending with `newest`; those purged meanwhile end it.
pub(super) async fn up_to(files: &Files, newest: BatchId) -> Result<Vec<(MicroBatch, CommitEntry)>, Error> {
    let mut found = Vec::new();
    for batch in (0..=newest).rev() {
        let (Some(plan), Some(commit)) = (read_plan(files, batch).await?, read_commit(files, batch).await?) else {
            break;
        };
        found.push((plan.plan, commit));
    }
    found.reverse();
    Ok(found)
}

/// Step 2, the fence.
pub(super) async fn log_plan(files: &Files, plan: &MicroBatch) -> Result<LoggedPlan, Error> {
    let file = numbered("offsets", plan.batch);
    let bytes = files.encode(&file, plan)?;
    files.failpoint("plan.before_put", &file)?;
    if let Created::Theirs(found) = files.create(&file, &bytes).await? {
        let epoch = files.decode::<MicroBatch>(&file, &found)?.epoch;
        return Err(Error::Superseded { url: files.url().to_string(), file, epoch });
    }
    files.failpoint("plan.after_put", &file)?;
    Ok(LoggedPlan { plan: plan.clone(), digest: digest(&bytes), bytes })
}

/// A plan out of the bytes of `offsets/<batch>.json`, wherever they were kept.
pub(super) fn decode_plan(files: &Files, bytes: Bytes) -> Result<LoggedPlan, Error> {
    let plan: MicroBatch = files.decode("offsets/", &bytes)?;
    Ok(LoggedPlan { plan, digest: digest(&bytes), bytes })
}

/// Writes a plan again that this location has lost.
pub(super) async fn restore_plan(files: &Files, logged: &LoggedPlan) -> Result<(), Error> {
    let file = numbered("offsets", logged.plan.batch);
    match files.create(&file, &logged.bytes).await? {
        Created::Ours => Ok(()),
        Created::Theirs(_) => Err(files.refused(format!("another process has just created {file}"))),
    }
}

/// Step 6: the batch is done.
pub(super) async fn log_commit(files: &Files, commit: &CommitEntry) -> Result<(), Error> {
    let file = numbered("commits", commit.batch);
    let bytes = files.encode(&file, commit)?;
    files.failpoint("commit_log.before_put", &file)?;
    if let Created::Theirs(found) = files.create(&file, &bytes).await? {
        let theirs: CommitEntry = files.decode(&file, &found)?;
        if theirs.plan_digest != commit.plan_digest {
            return Err(files.damaged(
                &file,
                format!("it says that another plan of batch {} was committed than the one just executed", commit.batch),
            ));
        }
        return Err(Error::AlreadyCommitted { url: files.url().to_string(), file, epoch: theirs.epoch });
    }
    files.failpoint("commit_log.after_put", &file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commits_from_before_partitions_were_remembered_are_read() {
        let commit: CommitEntry = serde_json::from_str(
            r#"{"batch":3,"epoch":1,"plan_digest":"d","watermark_next_ms":7,"state":[],"snapshots":{},"counts":{},
                "committed_at_ms":1}"#,
        )
        .unwrap();
        assert_eq!(commit.watermark_next_ms, Some(7));
        assert!(commit.event_times.is_empty());
    }

    #[test]
    fn newest_entries_that_can_stand_side_by_side() {
        let ok = [
            (None, None),
            (Some(0), None),
            (Some(0), Some(0)),
            (Some(1), Some(0)),
            (Some(7), Some(7)),
            (Some(7), Some(6)),
        ];
        let all = [None, Some(0), Some(1), Some(5), Some(6), Some(7), Some(8), Some(u64::MAX)];
        for plan in all {
            for commit in all {
                let expected = ok.contains(&(plan, commit))
                    || matches!((plan, commit), (Some(p), Some(c)) if p == c || Some(p) == c.checked_add(1));
                assert_eq!(consistent(plan, commit), expected, "{plan:?} {commit:?}");
            }
        }
        for wrong in [(None, Some(0)), (Some(1), None), (Some(2), Some(0)), (Some(0), Some(1)), (Some(6), Some(8))] {
            assert!(!consistent(wrong.0, wrong.1), "{wrong:?}");
        }
    }
}
