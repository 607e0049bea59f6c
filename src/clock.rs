//! The wall clock, injected wherever logic depends on it.

use std::sync::Arc;

/// Milliseconds since the Unix epoch.
pub type ClockMs = Arc<dyn Fn() -> i64 + Send + Sync>;

pub fn system() -> ClockMs {
    Arc::new(|| jiff::Timestamp::now().as_millisecond())
}
