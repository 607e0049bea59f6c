//! The aggregation of a partition, in the order of its offsets, by whichever worker finds it free.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use arrow::array::RecordBatch;

use super::{Job, lock};
use crate::batch::MicroBatch;
use crate::error::Error;
use crate::pipeline::{MessageType, Pipeline};
use crate::state::Lane;

/// The aggregation of one partition's rows of one type: chunks may arrive in any order and are taken in offset order.
pub(super) struct OrderedLane {
    state: Mutex<LaneState>,
    drained: Condvar,
}

struct LaneState {
    next: u64,
    waiting: BTreeMap<u64, RecordBatch>,
    /// None while a worker is aggregating into it.
    lane: Option<Lane>,
}

impl OrderedLane {
    pub fn new(pipeline: &Pipeline, of: &MessageType, plan: &MicroBatch) -> Self {
        let event_time = of.event_time.unwrap_or_default();
        let lane = Lane::new(pipeline.queries.clone(), of.queries.clone(), event_time, plan.watermarks.late());
        OrderedLane {
            state: Mutex::new(LaneState { next: 0, waiting: BTreeMap::new(), lane: Some(lane) }),
            drained: Condvar::new(),
        }
    }

    /// Hands in a decoded chunk. If no one is aggregating, this worker does, for as long as the next chunk is there.
    pub fn submit(&self, sequence: u64, batch: RecordBatch, job: &Job<'_>) -> Result<(), Error> {
        let mut state = lock(&self.state);
        state.waiting.insert(sequence, batch);
        loop {
            let next = state.next;
            if state.lane.is_none() {
                // Someone else is aggregating and will come to ours; wait only so that a single hot partition
                // cannot be decoded far ahead of its aggregation.
                if state.waiting.len() <= 2 * job.pipeline.workers {
                    return Ok(());
                }
                if job.cancel.load(Ordering::Relaxed) {
                    return Err(Error::Cancelled);
                }
                let timeout = Duration::from_millis(50);
                state = self.drained.wait_timeout(state, timeout).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            let Some(batch) = state.waiting.remove(&next) else { return Ok(()) };
            let Some(mut lane) = state.lane.take() else { return Ok(()) };
            state.next += 1;
            drop(state);
            let updated = lane.update(&batch);
            state = lock(&self.state);
            state.lane = Some(lane);
            self.drained.notify_all();
            updated?;
        }
    }

    pub fn into_lane(self) -> Result<Lane, Error> {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        if !state.waiting.is_empty() {
            return Err(Error::Internal(format!("chunk {} of a partition never arrived", state.next)));
        }
        state.lane.ok_or_else(|| Error::Internal("a worker left with a partition's aggregation".into()))
    }
}
