//! What an error asks of the caller. Every module has its own `thiserror` enum with a `kind()`; this is their common
//! language and the one type in which they meet, in [`crate::query`].

/// What the caller does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It did not happen; trying again may help.
    Transient,
    /// It may have happened: look, then try again.
    Indeterminate,
    /// Trying again cannot help; a person has to decide. The process ends with exit code 3.
    Fatal,
}

/// Any failure of a running query.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::Error),
    #[error(transparent)]
    Source(#[from] crate::source::Error),
    #[error(transparent)]
    Transform(#[from] crate::transform::Error),
    #[error(transparent)]
    State(#[from] crate::state::Error),
    #[error(transparent)]
    Sink(#[from] crate::sink::Error),
    #[error("stage {stage} took longer than its deadline of {deadline:?}")]
    Deadline { stage: &'static str, deadline: std::time::Duration },
    /// A failure of Floe itself, such as a worker that panicked.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Error {
    pub fn kind(&self) -> Kind {
        match self {
            Error::Checkpoint(e) => e.kind(),
            Error::Source(e) => e.kind(),
            Error::Transform(e) => e.kind(),
            Error::State(e) => e.kind(),
            Error::Sink(e) => e.kind(),
            Error::Deadline { .. } => Kind::Indeterminate,
            Error::Internal(_) => Kind::Transient,
        }
    }
}
