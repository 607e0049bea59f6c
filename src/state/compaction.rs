//! Compaction: the oldest state files merged into runs, in the background, while batches go on.
//!
//! Reads files and never the windows in memory, a share at a time; writes runs that nothing names until
//! [`StateStore::adopt`] has put them in the place of what they were made from and the next commit says so. Killed at any
//! moment it leaves files that no commit names, which the purge removes. Does not own: the thread it runs on.
//!
//! Invariants: only a beginning of the files is merged, in its order, so that sums of doubles associate as they do in memory;
//! what only one file has is copied as it is; a run none of whose windows any delta has touched stays.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use uuid::Uuid;

use super::file::{Builder, Section};
use super::query::WindowQuery;
use super::shard::{self, Shard};
use super::stored::{self, LiveFile, Pieces, Reader};
use super::table::{self, Table};
use super::{Error, SECTION_GROUPS, StateStore, Unit, closed, query_of};
use crate::batch::BatchId;
use crate::checkpoint::{Checkpoint, StateKind};
use crate::failpoint;

/// Fewer deltas than these are left alone.
const FEW_DELTAS: usize = 16;
/// So many are merged however large the runs are; fewer, once they are half as large as the runs.
const MANY_DELTAS: usize = 64;

/// One compaction, ready to run on a thread of its own.
pub struct Compaction {
    queries: Arc<[WindowQuery]>,
    reader: Reader,
    inputs: Vec<LiveFile>,
    batch: BatchId,
    attempt: Uuid,
    evict_ms: i64,
    share: u64,
    cancelled: Arc<AtomicBool>,
}

/// What a compaction has made, and of which files.
pub struct Compacted {
    inputs: BTreeSet<String>,
    outputs: Vec<LiveFile>,
    pub bytes_read: u64,
    pub bytes_written: u64,
}

impl Compacted {
    pub fn files(&self) -> (usize, usize) {
        (self.inputs.len(), self.outputs.len())
    }
}

impl StateStore {
    /// Files that compaction has not been over yet.
    pub fn deltas(&self) -> usize {
        self.files.iter().filter(|f| !f.file.is_run()).count()
    }

    /// The compaction that is due after batch `batch` is committed, if one is.
    pub fn compaction(&self, batch: BatchId, evict_ms: i64) -> Option<Compaction> {
        let bytes =
            |runs| self.files.iter().map(|f| &f.file).filter(|f| f.is_run() == runs).map(|f| f.bytes).sum::<u64>();
        let deltas = self.deltas();
        let due = deltas >= MANY_DELTAS || deltas >= FEW_DELTAS && 2 * bytes(false) >= bytes(true);
        if due { self.compaction_of_all(batch, evict_ms) } else { None }
    }

    pub(super) fn compaction_of_all(&self, batch: BatchId, evict_ms: i64) -> Option<Compaction> {
        let residence = self.residence.as_ref()?;
        let (runs, deltas): (Vec<_>, Vec<_>) = self.files.iter().cloned().partition(|f| f.file.is_run());
        let open = |file: &LiveFile| {
            let entries = file.index.entries.iter();
            entries.filter(|e| !closed(e.end_us, evict_ms)).map(|e| e.unit).collect::<BTreeSet<Unit>>()
        };
        let touched: BTreeSet<Unit> = deltas.iter().flat_map(open).collect();
        let share = residence.share;
        let stays = |run: &LiveFile| run.file.bytes >= share && open(run).is_disjoint(&touched);
        Some(Compaction {
            queries: self.queries.clone(),
            reader: residence.reader.clone(),
            inputs: runs.into_iter().filter(|run| !stays(run)).chain(deltas).collect(),
            batch,
            attempt: Uuid::new_v4(),
            evict_ms,
            share,
            cancelled: Arc::default(),
        })
    }

    /// Puts the runs in the place of the files that they were made from. The next commit makes it so.
    pub fn adopt(&mut self, compacted: Compacted) {
        let Compacted { inputs, outputs, .. } = compacted;
        let left = self.files.iter().filter(|f| !inputs.contains(&f.file.name)).cloned();
        // Runs first; they have no windows in common, or no shards of one.
        let (runs, deltas): (Vec<_>, Vec<_>) = outputs.into_iter().chain(left).partition(|f| f.file.is_run());
        self.files = Arc::new(runs.into_iter().chain(deltas).collect());
        for (unit, extent) in stored::extents(&self.files, i64::MIN / 1000) {
            if let Some(window) = self.open.get_mut(&unit) {
                window.stored_groups = extent.groups;
            }
        }
    }
}

impl Compaction {
    /// Beginnings of the names of the files that have to stay while it runs.
    pub fn in_use(&self) -> Vec<String> {
        let inputs = self.inputs.iter().map(|f| f.file.name.clone());
        inputs.chain([Checkpoint::state_names(self.batch, self.attempt)]).collect()
    }

    /// Set it, and the compaction ends at the next window.
    pub fn cancelled(&self) -> Arc<AtomicBool> {
        self.cancelled.clone()
    }

    pub fn files(&self) -> usize {
        self.inputs.len()
    }

    /// Blocks. None: it was cancelled.
    pub fn run(self) -> Result<Option<Compacted>, Error> {
        let mut output = Output { compaction: &self, builder: Builder::new(), files: Vec::new() };
        let extents = stored::extents(&self.inputs, self.evict_ms);
        for span in stored::spans(extents.into_iter().map(|(unit, extent)| (unit, extent.bytes)), self.share) {
            for (unit, pieces) in self.reader.fetch(&self.queries, &self.inputs, &span)? {
                if self.cancelled.load(Ordering::Relaxed) {
                    return Ok(None);
                }
                output.unit(unit, &pieces, span.shard)?;
            }
        }
        output.flush()?;
        let outputs = output.files;
        Ok(Some(Compacted {
            inputs: self.inputs.iter().map(|f| f.file.name.clone()).collect(),
            bytes_read: self.inputs.iter().map(|f| f.file.bytes).sum(),
            bytes_written: outputs.iter().map(|f| f.file.bytes).sum(),
            outputs,
        }))
    }
}

/// The runs in the making: one file of about two shares after another.
struct Output<'a> {
    compaction: &'a Compaction,
    builder: Builder,
    files: Vec<LiveFile>,
}

impl Output<'_> {
    fn unit(&mut self, unit: Unit, pieces: &Pieces, shard: Shard) -> Result<(), Error> {
        let Some((first, _)) = pieces.first() else { return Ok(()) };
        if pieces.iter().all(|(file, s)| file == first && shard.covers(s.entry.shard)) {
            for (_, sections) in pieces {
                self.builder.copy(&sections.entry, sections.bytes());
            }
            return self.flush_if_full();
        }
        let query = query_of(&self.compaction.queries, unit)?;
        let mut table = Table::new(query).map_err(|e| query.error(&e))?;
        stored::merge(query, &mut table, pieces, shard)?;
        table.forget_closed(self.compaction.evict_ms).map_err(|e| query.error(&e))?;
        if table.groups() == 0 {
            return Ok(());
        }
        for partial in table.into_partials(query).map_err(|e| query.error(&e))? {
            for (shard, partial) in shard::split(query, partial, shard, SECTION_GROUPS).map_err(|e| query.error(&e))? {
                let end_us = table::end_of(query, unit, &partial).map_err(|e| query.error(&e))?;
                self.builder.push(&Section::encode(query, unit, shard, end_us, &partial)?);
            }
        }
        self.flush_if_full()
    }

    fn flush_if_full(&mut self) -> Result<(), Error> {
        if self.builder.len() >= 2 * self.compaction.share { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), Error> {
        let Compaction { reader, batch, attempt, .. } = self.compaction;
        let run = std::mem::replace(&mut self.builder, Builder::new()).finish(reader.numbers());
        if run.groups == 0 {
            return Ok(());
        }
        let kind = StateKind::Run(self.files.len() as u32);
        let crc32 = run.crc32();
        let put = reader.checkpoint().put_state(*batch, *attempt, kind, run.bytes, crc32, run.max_window_end_us);
        let file = reader.block_on(put)?;
        self.files.push(LiveFile { file, index: run.index });
        match failpoint::hit("state.compaction") {
            true => Err(Error::Failpoint("state.compaction")),
            false => Ok(()),
        }
    }
}
