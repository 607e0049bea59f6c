//! What an error asks of the caller. Every module has its own `thiserror` enum with a `kind()`; this is their common
//! language and the one type in which they meet, in [`crate::query`].

use std::net::SocketAddr;
use std::time::Duration;

use uuid::Uuid;

use crate::batch::{BatchId, Gap, TopicPartition};

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
    /// The configuration does not compile: SQL that no longer fits the schema, say.
    #[error("{0}")]
    Compile(String),
    #[error(transparent)]
    Storage(#[from] crate::storage::OpenError),
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::Error),
    #[error("{0}. Start over with a new checkpoint and new tables, or a new pipeline name")]
    Vanished(#[from] crate::batch::Vanished),
    #[error(transparent)]
    Source(#[from] crate::source::Error),
    #[error(transparent)]
    Registry(#[from] crate::decode::registry::Error),
    #[error(transparent)]
    Transform(#[from] crate::transform::Error),
    #[error(transparent)]
    State(#[from] crate::state::Error),
    #[error(transparent)]
    Sink(#[from] crate::sink::Error),
    #[error("cannot listen on {listen}: {message}; set http.listen to a free address, or to \"\" for no HTTP server")]
    Http { listen: SocketAddr, message: String },
    #[error("stage {stage} took longer than its deadline of {deadline:?} (deadlines.{} in the configuration)", deadline_setting(.stage))]
    Deadline { stage: &'static str, deadline: Duration },
    #[error(
        "batch {batch} was planned with another configuration and cannot be finished with this one, because some table has it \
         already or the tables are others now. Start once with the configuration that it was executed with \
         (trigger.available_now is enough), then change schema, transform, expectations, windows or tables"
    )]
    ConfigChanged { batch: BatchId },
    #[error(
        "the configuration has changed since batch {batch} in a way that the checkpoint cannot follow:\n{obstacles}\nNothing was \
         read and no table was changed; `floe plan FILE` shows all changes"
    )]
    Changes { batch: BatchId, obstacles: String },
    #[error(
        "{0}, and its on_fail is \"fail\". The batch is not committed and nothing is lost. Mend what writes the topic, \
         correct the expectation, or set its on_fail to \"dead_letter\", \"drop\" or \"warn\"; then start again"
    )]
    Expectation(crate::quality::Violation),
    #[error(
        "batch {batch} is held back: {reason}. Nothing of it is committed and nothing is lost. Mend the schema or the \
         expectations and start again; or run `floe resume FILE` to commit the batch with its dead letters"
    )]
    BreakerOpen { batch: BatchId, plan_digest: String, reason: String },
    #[error("data loss: {}. Set source.fail_on_data_loss = false to go on without them (each gap is then kept as a row of the dead letters), or start over with a new checkpoint and new tables", gaps_text(.gaps))]
    DataLoss { gaps: Vec<Gap> },
    #[error("records of {partition} from offset {wanted} on expired while the batch was being read")]
    Expired { partition: TopicPartition, wanted: i64 },
    #[error(
        "topic {topic} was deleted and created again (id {then} then, {now} now): the offsets of the checkpoint mean other \
         records. Start over with a new checkpoint and new tables, or a new pipeline name"
    )]
    TopicRecreated { topic: String, then: String, now: String },
    #[error(
        "this checkpoint is older than the table: {checkpoint} knows {newest}, but {table} already has batch {batch}. A \
         restored backup? Going on would lose rows. Restore the newest checkpoint, or start over with a new checkpoint and new tables"
    )]
    CheckpointOlder { checkpoint: String, newest: String, table: String, batch: BatchId },
    #[error(
        "{table} already has batch {batch} of pipeline {pipeline}, written with another checkpoint (query id {query_id}), and \
         {checkpoint} is empty: everything would be read twice. Restore that checkpoint; or rebuild it with \
         `floe recover --from-table FILE`; or give this pipeline another name and \
         new starting offsets to go on beside those rows; or drop the tables and start over"
    )]
    CheckpointLost { table: String, pipeline: String, query_id: Uuid, batch: BatchId, checkpoint: String },
    #[error(
        "table {table} was dropped and created again since batch {batch} (uuid {then} then, {now} now): what it held is gone. \
         Restore it, or start over with a new checkpoint and new tables"
    )]
    TableRecreated { table: String, then: Uuid, now: Uuid, batch: BatchId },
    #[error(
        "table {table} (uuid {uuid}) is not in the catalog, though batch {batch} was planned for it: what it held is gone, or this is \
         another catalog. Nothing was created. Restore it, or start over with a new checkpoint and new tables"
    )]
    TableGone { table: String, uuid: Uuid, batch: BatchId },
    #[error(
        "table {table} is older than the checkpoint: it has {}, the checkpoint has committed batch {committed}. An old copy of the \
         catalog? Rows in between are missing from it. Restore the newest catalog, or start over with a new checkpoint and new tables",
        batch_text(.has)
    )]
    TableOlder { table: String, has: Option<BatchId>, committed: BatchId },
    /// Why a checkpoint cannot be rebuilt from the tables.
    #[error("{0}")]
    NotRebuilt(String),
    /// Another worker of the batch failed first, or the stage's deadline passed.
    #[error("cancelled")]
    Cancelled,
    /// A failure of Floe itself, such as a worker that panicked.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Error {
    pub fn kind(&self) -> Kind {
        match self {
            Error::Storage(_) | Error::Vanished(_) | Error::Compile(_) | Error::Http { .. } => Kind::Fatal,
            Error::Checkpoint(e) => e.kind(),
            Error::Source(e) => e.kind(),
            Error::Registry(e) => e.kind(),
            Error::Transform(e) => e.kind(),
            Error::State(e) => e.kind(),
            Error::Sink(e) => e.kind(),
            Error::Deadline { .. } => Kind::Indeterminate,
            Error::Cancelled | Error::Internal(_) | Error::Expired { .. } => Kind::Transient,
            Error::ConfigChanged { .. }
            | Error::Changes { .. }
            | Error::Expectation(_)
            | Error::BreakerOpen { .. }
            | Error::DataLoss { .. }
            | Error::TopicRecreated { .. }
            | Error::CheckpointOlder { .. }
            | Error::CheckpointLost { .. }
            | Error::TableRecreated { .. }
            | Error::TableGone { .. }
            | Error::NotRebuilt(_)
            | Error::TableOlder { .. } => Kind::Fatal,
        }
    }

    /// 2: the configuration is wrong; 3: a person has to decide; 1: anything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Compile(_) | Error::Storage(_) => 2,
            Error::Http { .. } => 1,
            e if e.kind() == Kind::Fatal => 3,
            _ => 1,
        }
    }
}

fn gaps_text(gaps: &[Gap]) -> String {
    let texts: Vec<String> = gaps
        .iter()
        .map(|g| {
            format!(
                "offsets [{}, {}) of {}-{} are gone ({})",
                g.range.start, g.range.end, g.topic, g.partition, g.cause
            )
        })
        .collect();
    texts.join("; ")
}

/// Four stages write to the checkpoint and share its deadline.
fn deadline_setting(stage: &str) -> &str {
    match stage {
        "wal_commit" | "breaker" | "state_commit" | "commit_log" => "checkpoint",
        "commit_tables" | "publish_dead_letters" => "commit",
        stage => stage,
    }
}

fn batch_text(batch: &Option<BatchId>) -> String {
    batch.map_or_else(|| "no batch".to_string(), |b| format!("batch {b}"))
}

/// The causes too: reqwest's own text is only that sending failed.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Some say their causes themselves, though not all of them.
        let what = cause.to_string();
        if !text.contains(&what) {
            text = format!("{text}: {what}");
        }
        source = cause.source();
    }
    text
}
