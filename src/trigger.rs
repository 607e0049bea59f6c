//! When the next micro-batch runs.

use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// A batch every interval; when one takes longer, the next follows at once.
    ProcessingTime(Duration),
    /// Drain what is there at the start, in bounded batches, then stop.
    AvailableNow,
}
