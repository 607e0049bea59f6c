//! What can go wrong with a checkpoint, named by what the caller does next.

use crate::error::Kind;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store is out of reach, full or slow; nothing has happened.
    #[error("checkpoint {url}: {file}: {problem}")]
    Transient { url: String, file: String, problem: String },
    /// A write may have happened and looking did not work either.
    #[error("checkpoint {url}: {file}: it is unknown whether it was written, recovery will look again: {problem}")]
    Indeterminate { url: String, file: String, problem: String },
    /// Another plan of this number was logged first: by another process, or by an earlier put of ours that was slow to
    /// arrive. Recover; the owner check decides who goes on.
    #[error(
        "checkpoint {url}: {file}: a different plan of this batch was logged first, by epoch {epoch}; recovering from it"
    )]
    Superseded { url: String, file: String, epoch: u64 },
    /// Somebody else finished this very plan. Recover; the owner check decides who goes on.
    #[error("checkpoint {url}: {file}: this batch was finished already, by epoch {epoch}; recovering from it")]
    AlreadyCommitted { url: String, file: String, epoch: u64 },
    #[error(
        "checkpoint {url}: another process owns this query now: epoch {epoch} (ours is {ours}), process {pid} on host {host}, \
         since {since}; this one stops. If both were started on purpose, give each its own checkpoint location and tables"
    )]
    OtherOwner { url: String, ours: u64, epoch: u64, host: String, pid: u32, since: String },
    /// A file is missing, damaged or contradicts another one.
    #[error("checkpoint {url}: {file}: {problem}")]
    Damaged { url: String, file: String, problem: String },
    /// This location is not for this pipeline or not for this version of Floe.
    #[error("checkpoint {url}: {problem}")]
    Refused { url: String, problem: String },
}

impl Error {
    pub fn kind(&self) -> Kind {
        match self {
            Error::Transient { .. } | Error::Superseded { .. } | Error::AlreadyCommitted { .. } => Kind::Transient,
            Error::Indeterminate { .. } => Kind::Indeterminate,
            Error::OtherOwner { .. } | Error::Damaged { .. } | Error::Refused { .. } => Kind::Fatal,
        }
    }
}

/// What a person can do about damage; every such message ends with it.
pub(super) const ADVICE: &str = "restore this file from a copy of the same checkpoint made since the last batch, or start \
                                 over with a new checkpoint location and new tables (checkpoints/README.md says how)";
