//! Where batches go: tables, and the dead letters a topic as well.

pub mod iceberg;
pub mod kafka;

use crate::error::Kind;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{message}")]
    Transient { message: String },
    /// The commit may have happened: reload and look.
    #[error("{message}")]
    Indeterminate { message: String },
    #[error("{message}")]
    Fatal { message: String },
}

impl Error {
    pub(crate) fn transient(message: impl Into<String>) -> Self {
        Error::Transient { message: message.into() }
    }

    pub(crate) fn indeterminate(message: impl Into<String>) -> Self {
        Error::Indeterminate { message: message.into() }
    }

    pub(crate) fn fatal(message: impl Into<String>) -> Self {
        Error::Fatal { message: message.into() }
    }

    pub fn kind(&self) -> Kind {
        match self {
            Error::Transient { .. } => Kind::Transient,
            Error::Indeterminate { .. } => Kind::Indeterminate,
            Error::Fatal { .. } => Kind::Fatal,
        }
    }
}
