//! THE PROTOCOL: how a batch happens exactly once. Layout of a checkpoint, on any object store:
//!
//! ```text
//! metadata.json          query id (UUID, for ever), format version, pipeline name
//! owners/<epoch>.json    who runs this query; the highest epoch owns it
//! offsets/<batch>.json   write-ahead: ranges, topic ids, table UUIDs, watermarks in force, config fingerprint, epoch
//! commits/<batch>.json   done: plan digest, next watermark, latest event time of each partition, how far back open windows
//!                        reach, settings, numbers of the windows, state files that make up the state, snapshot ids, counts
//! state/<batch>-<attempt>.delta | -<part>.run
//! control/held-<batch>.json, resume-<batch>.json   the circuit breaker holds a batch back; a person lets it through
//! control/drop-<batch>.json                        state of windows that are no more may be dropped after this batch
//! control/unknown-<batch>.json                     schema ids that the registry did not know, where there is one
//! ```
//!
//! The steps of batch N; other modules name them by these numbers.
//!
//! 1. **Plan N**: [`Checkpoint::check_owner`], then plan from `commits/N-1` and the brokers' latest offsets
//!    ([`crate::batch::plan_ranges`]). A batch without data still runs when the watermark has moved, as
//!    the end of a wait for an idle partition moves it. The plan says which watermark is in force and why.
//! 2. **Log** `offsets/N`, create-if-absent ([`Checkpoint::log_plan`]). This is the fence: exactly one plan N exists.
//! 3. **Execute**: a pure function of the plan, the state after N-1 and the configuration. Data files get names unique
//!    to the attempt and are invisible until step 5. What a schema registry answers may change in one way: an id becomes known. So
//!    what it did not know is logged before step 5 ([`Checkpoint::log_unknown_ids`]) and holds for every further attempt.
//! 4. **Persist** the state delta of this attempt ([`Checkpoint::put_state`]).
//! 5. **Commit** the tables. Each carries a marker: batch and digest of the plan, the bytes of `offsets/N`. A marker at N with
//!    this digest: done, skip. Below N: commit. Anything else: fatal, this checkpoint is older than the table.
//! 6. **Log** `commits/N`, create-if-absent, naming the state files ([`Checkpoint::log_commit`]). Only now is N done.
//! 7. **Tidy**: [`Checkpoint::purge`]. Where `commits/N` owes dead letters to a topic, they are published before N+1 is planned
//!    ([`crate::dead_letter::topic`]).
//!
//! **Recovery** ([`Checkpoint::recover`]): `offsets/N` without `commits/N` means replay N from step 3 with the same ranges on
//! the state of N-1. Every failure that is not fatal takes the same road: drop what is in memory, back off, recover.
//!
//! A batch may be executed with another configuration than it was planned with (expectations or the schema were mended while it
//! was held back, say), as long as no table has it: its marker then names that configuration too. A table that has the batch
//! from one configuration refuses it from another, so that state and tables are always of one execution.
//!
//! **Ownership** ([`Checkpoint::claim`]): a starting process claims the next epoch; whoever sees a higher one stops. A plan
//! logged by a lower epoch is adopted and replayed. Correctness does not rest on this: two processes on one checkpoint can
//! only ever produce the same batch once, by steps 2, 5 and 6. A process that slept so long that its successor has purged
//! `offsets/N` can log a plan N of its own; step 5 then finds a marker beyond N and refuses.
//!
//! Does not own: planning, executing, committing tables. Invariants: at most one batch is uncommitted; a file once logged is
//! never edited; nothing reads the consumer group's offsets; every file carries a checksum, and a damaged one is named,
//! never skipped.

mod control;
mod error;
mod files;
mod logs;
mod owners;
mod probe;
mod state_files;
#[cfg(test)]
mod tests;
mod windows;

use std::collections::BTreeSet;
use std::ops::Range;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use control::Held;
pub use error::Error;
pub use logs::{CommitEntry, Counts, LoggedPlan, Recovered};
pub use owners::Owner;
pub use state_files::{StateFile, StateKind};
pub use windows::{WindowState, WindowStates};

use crate::batch::{BatchId, MicroBatch};
use crate::storage::Location;
use files::{Created, Files};

const FORMAT: u32 = 1;
const METADATA: &str = "metadata.json";

/// What `metadata.json` says; written once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    pub format: u32,
    pub query_id: Uuid,
    pub pipeline: String,
    pub created_at: String,
}

/// The checkpoint of one query.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    files: Files,
    metadata: Metadata,
    is_new: bool,
    /// Zero until [`Checkpoint::claim`].
    epoch: u64,
}

impl Checkpoint {
    /// Whether the store can create a file only if it is absent, which steps 2 and 6 stand on: [`Error::Refused`] where it
    /// cannot. Leaves nothing behind.
    pub async fn probe(location: &Location) -> Result<(), Error> {
        probe::create_if_absent(location).await
    }

    /// Reads `metadata.json` or creates it with a new query id. Of two processes that create it at once both get the
    /// winner's. Refuses another pipeline's checkpoint and a location that has logs but no metadata.
    pub async fn open(location: Location, pipeline: &str) -> Result<Checkpoint, Error> {
        let files = Files::new(location);
        if let Some(metadata) = read_metadata(&files).await? {
            return Checkpoint::with(files, metadata, false, pipeline);
        }
        for folder in ["offsets", "commits"] {
            if let Some(entry) = files.list(folder).await?.first() {
                // Metadata comes before any log: another process may have created both since we looked.
                if let Some(metadata) = read_metadata(&files).await? {
                    return Checkpoint::with(files, metadata, false, pipeline);
                }
                let problem =
                    format!("the file is missing although the checkpoint is in use ({} is there)", entry.file);
                return Err(files.damaged(METADATA, problem));
            }
        }
        let metadata = Metadata {
            format: FORMAT,
            query_id: Uuid::new_v4(),
            pipeline: pipeline.to_string(),
            created_at: jiff::Timestamp::now().to_string(),
        };
        match files.create(METADATA, &files.encode(METADATA, &metadata)?).await? {
            Created::Ours => Checkpoint::with(files, metadata, true, pipeline),
            Created::Theirs(bytes) => {
                let metadata = decode_metadata(&files, &bytes)?;
                Checkpoint::with(files, metadata, false, pipeline)
            }
        }
    }

    /// A checkpoint that is about to be rebuilt where there is nothing: it exists for others only once
    /// [`Checkpoint::finish_rebuilding`] has written `metadata.json`.
    pub async fn rebuild(location: Location, pipeline: &str, query_id: Uuid) -> Result<Checkpoint, Error> {
        let files = Files::new(location);
        if let Some(found) =
            files.list("").await?.iter().find(|entry| entry.file.contains('/') || entry.file == METADATA)
        {
            return Err(files.refused(format!(
                "there is a checkpoint, or a part of one ({} is there), and it is never overwritten. If it is of no use any more, \
                 move it away; or set checkpoint.location to an empty place",
                found.file
            )));
        }
        let metadata = Metadata {
            format: FORMAT,
            query_id,
            pipeline: pipeline.to_string(),
            created_at: jiff::Timestamp::now().to_string(),
        };
        Ok(Checkpoint { files, metadata, is_new: false, epoch: 0 })
    }

    /// A plan out of the bytes that [`LoggedPlan::bytes`] had.
    pub fn decode_plan(&self, bytes: impl Into<Bytes>) -> Result<LoggedPlan, Error> {
        logs::decode_plan(&self.files, bytes.into())
    }

    pub async fn restore_plan(&self, plan: &LoggedPlan) -> Result<(), Error> {
        logs::restore_plan(&self.files, plan).await
    }

    /// After everything else, so that half a checkpoint is refused and not taken for a new one.
    pub async fn finish_rebuilding(&self) -> Result<(), Error> {
        match self.files.create(METADATA, &self.files.encode(METADATA, &self.metadata)?).await? {
            Created::Ours => Ok(()),
            Created::Theirs(_) => Err(self.files.refused("another process has just created a checkpoint here")),
        }
    }

    fn with(files: Files, metadata: Metadata, is_new: bool, pipeline: &str) -> Result<Checkpoint, Error> {
        if metadata.pipeline != pipeline {
            return Err(files.refused(format!(
                "it belongs to pipeline {:?}, not to {pipeline:?}; set checkpoint.location to a place of this pipeline's own",
                metadata.pipeline
            )));
        }
        Ok(Checkpoint { files, metadata, is_new, epoch: 0 })
    }

    /// Reads `metadata.json` without changing anything; `None` when there is no checkpoint yet.
    pub async fn inspect(location: Location) -> Result<Option<Metadata>, Error> {
        read_metadata(&Files::new(location)).await
    }

    pub fn query_id(&self) -> Uuid {
        self.metadata.query_id
    }

    /// True when this process has just created it.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    pub fn url(&self) -> &str {
        self.files.url()
    }

    /// Claims the next epoch.
    pub async fn claim(&mut self) -> Result<u64, Error> {
        self.epoch = owners::claim(&self.files).await?;
        Ok(self.epoch)
    }

    /// Fatal when a higher epoch than ours exists; call it before each plan.
    /// The epoch under which this process owns the query.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Fatal when a higher epoch is there: another process owns the query.
    pub async fn check_owner(&self) -> Result<(), Error> {
        owners::check(&self.files, self.epoch).await
    }

    /// The newest plan and the newest commit; fatal when they contradict each other.
    pub async fn recover(&self) -> Result<Recovered, Error> {
        logs::recover(&self.files).await
    }

    /// Step 2. A plan that is there with the same bytes is ours; with others it is [`Error::Superseded`].
    pub async fn log_plan(&self, plan: &MicroBatch) -> Result<LoggedPlan, Error> {
        logs::log_plan(&self.files, plan).await
    }

    /// Step 4. `batch` is the batch whose commit will name the file: [`Checkpoint::purge`] takes a file of an earlier
    /// batch that no commit names for a leftover.
    pub async fn put_state(
        &self,
        batch: BatchId,
        attempt: Uuid,
        kind: StateKind,
        bytes: impl Into<Bytes>,
        crc32: u32,
        max_window_end_us: Option<i64>,
    ) -> Result<StateFile, Error> {
        state_files::put(&self.files, batch, attempt, kind, bytes.into(), crc32, max_window_end_us).await
    }

    /// Deletes state files that no commit names.
    pub async fn remove_state(&self, files: &[StateFile]) -> Result<(), Error> {
        for file in files {
            self.files.delete(&file.name).await?;
        }
        Ok(())
    }

    /// The last bytes of a state file, at most `most`. Fatal when it is missing or not as long as it was.
    pub async fn open_state(&self, file: &StateFile, most: u64) -> Result<Bytes, Error> {
        let tail = file.bytes.saturating_sub(most)..file.bytes;
        Ok(state_files::read(&self.files, file, &[tail], true).await?.pop().unwrap_or_default())
    }

    /// Parts of a state file. Fatal when it is missing or too short.
    pub async fn read_state(&self, file: &StateFile, ranges: &[Range<u64>]) -> Result<Vec<Bytes>, Error> {
        state_files::read(&self.files, file, ranges, false).await
    }

    /// How the names of the state files of an attempt begin, for [`Checkpoint::purge`].
    pub fn state_names(batch: BatchId, attempt: Uuid) -> String {
        state_files::stem(batch, attempt)
    }

    /// Step 6. [`Error::AlreadyCommitted`] when somebody else finished this very plan.
    pub async fn log_commit(&self, commit: &CommitEntry) -> Result<(), Error> {
        logs::log_commit(&self.files, commit).await
    }

    /// Step 7, after `commits/<newest>`: deletes logs but for the last `retain` batches (at least two), former owners, and
    /// state up to batch `newest` that neither `live` nor the commit before names and that does not begin with one of the
    /// names `in_use`. Returns the number of files deleted.
    pub async fn purge(
        &self,
        newest: BatchId,
        retain: u64,
        live: &[StateFile],
        in_use: &[String],
    ) -> Result<u64, Error> {
        state_files::purge(&self.files, self.epoch, newest, retain, live, in_use).await
    }

    /// Says that the batch is held back. A batch has one plan, so saying it again changes nothing.
    pub async fn hold(&self, held: &Held) -> Result<(), Error> {
        control::hold(&self.files, held).await
    }

    /// Why this very plan is held back, if it is.
    pub async fn held(&self, plan: &LoggedPlan) -> Result<Option<Held>, Error> {
        control::held(&self.files, plan).await
    }

    /// Lets a batch through that is held back.
    pub async fn resume(&self, plan: &LoggedPlan) -> Result<(), Error> {
        control::resume(&self.files, plan).await
    }

    pub async fn is_resumed(&self, batch: BatchId, plan_digest: &str) -> Result<bool, Error> {
        control::is_resumed(&self.files, batch, plan_digest).await
    }

    /// Before step 5, by every execution that asked a schema registry. False when another one found other ids unknown:
    /// recover, and execute the batch again with those.
    pub async fn log_unknown_ids(
        &self,
        batch: BatchId,
        plan_digest: &str,
        schema_ids: BTreeSet<u32>,
    ) -> Result<bool, Error> {
        control::log_unknown_ids(&self.files, batch, plan_digest, schema_ids).await
    }

    /// What an earlier execution of this plan has logged.
    pub async fn unknown_ids(&self, batch: BatchId, plan_digest: &str) -> Result<Option<BTreeSet<u32>>, Error> {
        control::unknown_ids(&self.files, batch, plan_digest).await
    }

    /// A person agrees that the query goes on after `batch` without the open windows of these tables.
    pub async fn agree_to_drop(&self, batch: BatchId, tables: &BTreeSet<String>) -> Result<(), Error> {
        control::agree_to_drop(&self.files, batch, tables).await
    }

    pub async fn agreed_to_drop(&self, batch: BatchId, tables: &BTreeSet<String>) -> Result<bool, Error> {
        control::agreed_to_drop(&self.files, batch, tables).await
    }

    /// The plans and commits that are still there, in a row, ending with `newest`.
    pub async fn logs(&self, newest: BatchId) -> Result<Vec<(MicroBatch, CommitEntry)>, Error> {
        logs::up_to(&self.files, newest).await
    }

    /// Bytes of all files.
    pub async fn size_bytes(&self) -> Result<u64, Error> {
        Ok(self.files.list("").await?.iter().map(|entry| entry.bytes).sum())
    }
}

async fn read_metadata(files: &Files) -> Result<Option<Metadata>, Error> {
    match files.read(METADATA).await? {
        Some(bytes) => decode_metadata(files, &bytes).map(Some),
        None => Ok(None),
    }
}

/// The format version first: the rest of a later format may mean anything.
fn decode_metadata(files: &Files, bytes: &[u8]) -> Result<Metadata, Error> {
    #[derive(Deserialize)]
    struct Versioned {
        format: u32,
    }
    let format = files.decode::<Versioned>(METADATA, bytes)?.format;
    if format != FORMAT {
        return Err(files.refused(format!(
            "{METADATA} has format version {format}, this version of Floe reads {FORMAT}; run the version of Floe that wrote it"
        )));
    }
    files.decode(METADATA, bytes)
}
