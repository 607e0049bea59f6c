//! Open windows, their groups and accumulators; deltas and runs.

use crate::error::Kind;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{message}")]
    Fatal { message: String },
}

impl Error {
    pub fn kind(&self) -> Kind {
        Kind::Fatal
    }
}
