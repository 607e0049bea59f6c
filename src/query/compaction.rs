//! Compaction of the state files beside the batches: when it is started, taken over, and waited for.
//!
//! Owns: the one compaction that may be running. Does not own: what it does ([`crate::state::Compaction`]). A batch waits for it
//! only when so many deltas have piled up that going on would make recovery slower and slower.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use tokio::task::JoinHandle;

use super::{CancelOnDrop, millis};
use crate::batch::BatchId;
use crate::error::{Error, Kind};
use crate::failpoint;
use crate::state::{self, Compacted, Compaction, StateStore};
use crate::trigger::Trigger;

/// So many deltas are too many: the next batch waits until they are merged.
const TOO_MANY_DELTAS: usize = 256;
/// The same in a job that ends with its data: a compaction beside its last batch ends with it and comes to nothing.
const TOO_MANY_DELTAS_OF_JOBS: usize = 64;

pub(super) struct Background {
    too_many: usize,
    running: Option<Running>,
}

struct Running {
    task: JoinHandle<Result<Option<Compacted>, state::Error>>,
    started: Instant,
    in_use: Vec<String>,
    /// Ends it when the session ends.
    cancel: CancelOnDrop,
}

impl Background {
    pub fn new(trigger: Trigger) -> Background {
        let too_many = match trigger {
            Trigger::AvailableNow => TOO_MANY_DELTAS_OF_JOBS,
            Trigger::ProcessingTime(_) => TOO_MANY_DELTAS,
        };
        Background { too_many, running: None }
    }

    /// Before a batch: what is finished replaces the files that it was made from. `last` is the last committed batch and
    /// its watermark.
    pub async fn before_batch(
        &mut self,
        store: &mut StateStore,
        last: Option<(BatchId, i64)>,
    ) -> Result<Option<Compacted>, Error> {
        let too_many = store.deltas() >= self.too_many;
        if too_many {
            tracing::warn!(deltas = store.deltas(), "the batch waits for the compaction of state files");
            self.start(store, last);
        }
        if !too_many && !self.running.as_ref().is_some_and(|r| r.task.is_finished()) {
            return Ok(None);
        }
        // Dropped with the guard, it would be cancelled instead of waited for.
        let Some(Running { task, started, cancel: _cancel, .. }) = self.running.take() else { return Ok(None) };
        match task.await {
            Ok(Ok(compacted)) => {
                if let Some(compacted) = &compacted {
                    let (read, written) = compacted.files();
                    tracing::info!(
                        files_read = read,
                        files_written = written,
                        bytes_read = compacted.bytes_read,
                        bytes_written = compacted.bytes_written,
                        ms = millis(started),
                        "state files compacted"
                    );
                }
                Ok(compacted)
            }
            Ok(Err(e)) if e.kind() == Kind::Fatal => Err(e.into()),
            // Nothing rests on it: it is tried again after the batch. Unless the batches wait for it.
            Ok(Err(e)) if too_many => Err(e.into()),
            Ok(Err(e)) => {
                tracing::warn!(error = %e, "compaction of state files failed; it is tried again after the next batch");
                Ok(None)
            }
            Err(e) => Err(Error::Internal(format!("the compaction of state files did not end well: {e}"))),
        }
    }

    /// After a batch: starts a compaction if one is due and none is running.
    pub fn start(&mut self, store: &StateStore, last: Option<(BatchId, i64)>) {
        let Some((batch, evict_ms)) = last.filter(|_| self.running.is_none()) else { return };
        let Some(compaction) = store.compaction(batch, evict_ms) else { return };
        tracing::debug!(files = compaction.files(), "compacting state files");
        let cancelled: Arc<AtomicBool> = compaction.cancelled();
        self.running = Some(Running {
            in_use: Compaction::in_use(&compaction),
            task: tokio::task::spawn_blocking(move || compaction.run()),
            started: Instant::now(),
            cancel: CancelOnDrop(cancelled),
        });
    }

    /// Beginnings of the names of the files that a purge has to leave.
    pub fn in_use(&self) -> Vec<String> {
        self.running.as_ref().map(|r| r.in_use.clone()).unwrap_or_default()
    }
}

/// Takes over what a compaction has made.
pub(super) fn adopt(store: &mut StateStore, compacted: Compacted) -> Result<(), Error> {
    store.adopt(compacted);
    match failpoint::hit("state.adopted") {
        true => Err(Error::Internal("failpoint state.adopted".into())),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use object_store::memory::InMemory;
    use object_store::path::Path;
    use tokio::runtime::Runtime;
    use uuid::Uuid;

    use super::*;
    use crate::checkpoint::{Checkpoint, StateKind};
    use crate::state::tests::{MINUTE, NEVER, batch, config, lane, queries};
    use crate::state::{Numbers, Reader};
    use crate::storage::Location;

    #[test]
    fn a_batch_waits_where_too_many_deltas_have_piled_up_in_a_job_sooner() {
        let runtime = Runtime::new().unwrap();
        let location =
            Location { store: Arc::new(InMemory::new()), prefix: Path::from("ck"), url: "memory:///ck".into() };
        let checkpoint = Arc::new(runtime.block_on(Checkpoint::open(location, "p")).unwrap());
        let reader = Reader::new(checkpoint.clone(), runtime.handle().clone(), Numbers::default());
        let queries = queries(&[config(MINUTE as u64, &["device"], &[("events", "count(*)")])]);
        let mut store = StateStore::recover(queries.clone(), reader, &[], NEVER, u64::MAX / 8, 1).unwrap();
        let mut number = 0;
        let mut pile_up = |store: &mut StateStore, deltas: usize| {
            while store.deltas() < deltas {
                let rows = batch(&[(Some(number * MINUTE), Some("a"), None, None)]);
                let mut delta = store.merge_lanes(vec![lane(&queries, &[rows], NEVER)], NEVER, 1).unwrap();
                let (bytes, crc32, end) = (std::mem::take(&mut delta.bytes), delta.crc32(), delta.max_window_end_us);
                let put = checkpoint.put_state(number as u64, Uuid::new_v4(), StateKind::Delta, bytes, crc32, end);
                store.add(runtime.block_on(put).unwrap(), &delta);
                number += 1;
            }
        };
        for (trigger, too_many, runs) in
            [(Trigger::AvailableNow, 64, 0), (Trigger::ProcessingTime(Duration::from_secs(1)), 256, 1)]
        {
            let mut background = Background::new(trigger);
            let mut before_batch = |store: &mut StateStore| {
                runtime.block_on(background.before_batch(store, Some((1_000, NEVER)))).unwrap()
            };
            pile_up(&mut store, too_many - 1);
            assert!(before_batch(&mut store).is_none());
            pile_up(&mut store, too_many);
            let compacted = before_batch(&mut store).expect("it was waited for");
            assert_eq!(compacted.files(), (too_many + runs, 1));
            adopt(&mut store, compacted).unwrap();
            assert_eq!(store.deltas(), 0);
        }
        assert_eq!(store.stats().queries[0].open_windows, 64 + 256);
    }
}
