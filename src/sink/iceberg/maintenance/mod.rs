//! What keeps tables small and fast while they are written: old snapshots expired with the files that only they needed,
//! small data files compacted, files removed that nothing references.
//!
//! Owns: one round over the tables of a query. Does not own: when a round begins ([`crate::query`]); manifests and metadata
//! files, which ordinary commits look after. Invariants: a file is deleted only after the table, loaded anew, no longer
//! reaches it; nothing is deleted while the outcome of a commit is unknown; markers are never touched; a round that is
//! killed leaves files behind that a later one finds as orphans, and nothing else.

mod compact;
mod expire;
mod orphans;
mod reach;
mod rewrite;
mod small;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use iceberg::io::FileIO;
use serde::Serialize;

use super::catalog::{Catalog, LoadedTable, TableName};
use super::open_catalog;
use super::storage::TableStorage;
use crate::config::{CatalogConfig, MaintenanceConfig};
use crate::sink::Error;

/// In the summary of every snapshot that maintenance makes.
const SUMMARY_PROPERTY: &str = "floe.maintenance";

/// Data files stay that long after their last snapshot was current, for readers that still have it in hand, even where
/// snapshots are made so fast that the count has them expire earlier. What stays is removed as an orphan.
const READERS_GRACE: Duration = Duration::from_secs(300);

/// Looks after some tables of one catalog.
#[derive(Clone, Debug)]
pub struct Maintainer {
    catalog: Arc<dyn Catalog>,
    storage: TableStorage,
    file_io: FileIO,
    tables: Vec<TableName>,
}

/// One round: what it may do, and for how long.
#[derive(Clone, Debug)]
pub struct Round {
    pub policy: MaintenanceConfig,
    /// Whether to look for orphans, which lists all files of the tables.
    pub orphans: bool,
    /// Only find out what there is to do.
    pub dry_run: bool,
    /// Set from outside: stop as soon as possible.
    pub stop: Arc<AtomicBool>,
    readers_grace: Duration,
    deadline: Instant,
}

impl Round {
    pub fn new(policy: MaintenanceConfig, orphans: bool) -> Round {
        let deadline = Instant::now() + policy.time_budget;
        Round { policy, orphans, dry_run: false, stop: Arc::default(), readers_grace: READERS_GRACE, deadline }
    }

    pub fn dry(self) -> Round {
        Round { dry_run: true, ..self }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Whether nothing new is to be begun.
    fn over(&self) -> bool {
        self.stopped() || Instant::now() >= self.deadline
    }
}

/// What a round has done to one table, or would do.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TableReport {
    pub table: String,
    pub snapshots_expired: u64,
    /// Manifest lists, manifests, data files and statistics that only expired snapshots needed.
    pub files_expired: u64,
    /// Small data files that have become `files_written` larger ones.
    pub files_compacted: u64,
    pub files_written: u64,
    pub bytes_compacted: u64,
    pub orphans_removed: u64,
    pub bytes_of_orphans: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<String>,
}

impl fmt::Display for TableReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if self.snapshots_expired > 0 {
            parts.push(format!("{} snapshots expired with {} files", self.snapshots_expired, self.files_expired));
        }
        if self.files_compacted > 0 {
            let bytes = self.bytes_compacted;
            parts.push(format!("{} small files compacted ({bytes} bytes)", self.files_compacted));
        }
        if self.orphans_removed > 0 {
            parts.push(format!("{} orphans removed ({} bytes)", self.orphans_removed, self.bytes_of_orphans));
        }
        parts.extend(self.errors.iter().map(|error| format!("FAILED to {error}")));
        if parts.is_empty() {
            parts.push("nothing to do".into());
        }
        write!(f, "{}: {}", self.table, parts.join("; "))
    }
}

impl Maintainer {
    pub(super) fn new(catalog: Arc<dyn Catalog>, storage: TableStorage, tables: Vec<TableName>) -> Maintainer {
        let file_io = storage.file_io();
        Maintainer { catalog, storage, file_io, tables }
    }

    /// For tables of which some may not exist; creates none.
    pub async fn open(catalog: &CatalogConfig, tables: &[String]) -> Result<Maintainer, Error> {
        let storage = TableStorage::default();
        let tables = tables.iter().map(|name| TableName::parse(name)).collect::<Result<_, _>>()?;
        if let CatalogConfig::Sqlite { path, .. } = catalog
            && !path.exists()
        {
            return Err(Error::fatal(format!("there is no catalog at {}", path.display())));
        }
        Ok(Maintainer::new(open_catalog(catalog, &storage).await?, storage, tables))
    }

    /// Every table in turn, as far as the time allows. What fails is in the report and does not keep the rest from being done.
    pub async fn run(&self, round: &Round) -> Vec<TableReport> {
        let mut reports: Vec<TableReport> =
            self.tables.iter().map(|t| TableReport { table: t.to_string(), ..TableReport::default() }).collect();
        // First what is quick and keeps commits fast, then what makes new files.
        for (table, report) in self.tables.iter().zip(&mut reports) {
            if !round.over() {
                let done = self.expire(table, round, report).await;
                note(report, "expire snapshots", done);
            }
        }
        for (table, report) in self.tables.iter().zip(&mut reports) {
            if !round.over() {
                let done = self.compact(table, round, report).await;
                note(report, "compact small files", done);
            }
        }
        for (table, report) in self.tables.iter().zip(&mut reports) {
            if round.orphans && !round.over() {
                let done = self.remove_orphans(table, round, report).await;
                note(report, "remove orphans", done);
            }
        }
        reports
    }

    async fn load(&self, table: &TableName) -> Result<Option<LoadedTable>, Error> {
        self.catalog.load(table).await
    }
}

fn note(report: &mut TableReport, action: &str, done: Result<(), Error>) {
    if let Err(error) = done {
        tracing::warn!(table = report.table, action, %error, "maintenance failed; it is tried again in the next round");
        report.errors.push(format!("{action}: {error}"));
    }
}
