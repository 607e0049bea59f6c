//! The only user of the `iceberg` crate: data files, catalogs, commits.
//!
//! Owns: the tables of one query. Workers write files through a [`TableWriter`]; nothing is visible until
//! [`IcebergSink::commit`] has put the files and the batch's [`Marker`] into all tables. Does not own: batches, plans,
//! retries beyond a commit conflict ([`crate::query`]). The crate's own catalogs and transactions are not used: they
//! report success without knowing, and rebase silently on whatever they find.

mod bounds;
mod catalog;
mod commit;
#[cfg(test)]
mod conformance;
mod evolution;
mod files;
mod layout;
mod maintenance;
mod manifests;
mod marker;
mod metadata;
mod order;
mod plan;
mod probe;
mod read;
mod rest;
mod snapshot;
mod sqlite;
mod storage;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_order;
#[cfg(test)]
mod tests_properties;
mod transform;
mod vended;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

use arrow::datatypes::SchemaRef;
use futures::future::try_join_all;
use iceberg::io::FileIO;
use iceberg::spec::{Schema, TableMetadata};
use tokio::runtime::Handle;
use uuid::Uuid;

use self::catalog::{Catalog, LoadedTable, TableName};
use self::files::FileLayout;
use self::marker::{Carrier, carried, markers};
use self::plan::Opened;
use self::storage::TableStorage;
use crate::batch::BatchId;
use crate::config::CatalogConfig;
use crate::sink::Error;

pub use self::commit::{BatchCommit, Committed};
pub use self::evolution::Change;
pub use self::files::TableWriter;
pub use self::maintenance::{Maintainer, Round, TableReport};
pub use self::marker::{Marker, marker_property};
pub use self::plan::{TablePlan, TableStep};
pub use self::probe::{Probed, probe};
pub use self::read::{Append, PinnedTable, Rows};
pub use self::sqlite::CATALOG_NAME;
pub use iceberg::expr::{Predicate, Reference};
pub use iceberg::spec::{DataFile, Datum};

/// A table as the pipeline wants it.
#[derive(Clone, Debug)]
pub struct TableSpec {
    /// `namespace.table`.
    pub name: String,
    pub schema: SchemaRef,
    /// `day(event_timestamp)`, `bucket(16, device_id)`, `device_id`. Only for a table that has to be created.
    pub partition_by: Vec<String>,
    /// `device_id`, `event_timestamp desc`: the order of the rows in each file. Only for a table that has to be created: an
    /// existing one keeps its own.
    pub sort_by: Vec<String>,
    /// Only for a table that has to be created.
    pub properties: BTreeMap<String, String>,
}

#[derive(Clone, Debug)]
pub struct TableInfo {
    pub name: String,
    pub uuid: Uuid,
    pub location: String,
    /// The last batch of this query that the table has.
    pub marker: Option<Marker>,
    /// Other queries that have written to the table.
    pub others: Vec<(Uuid, Marker)>,
}

impl TableInfo {
    fn of(name: &TableName, metadata: &TableMetadata, query_id: Uuid) -> Result<TableInfo, Error> {
        let mut others = markers(metadata);
        others.retain(|(id, _)| *id != query_id);
        Ok(TableInfo {
            name: name.to_string(),
            uuid: metadata.uuid(),
            location: metadata.location().to_string(),
            marker: carried(name, metadata, query_id)?.map(|(_, marker)| marker),
            others,
        })
    }
}

#[derive(Clone, Debug)]
pub struct IcebergSink(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    catalog: Arc<dyn Catalog>,
    storage: TableStorage,
    file_io: FileIO,
    runtime: Handle,
    query_id: Uuid,
    marker_property: String,
    /// Where the marker of a table goes that has none of this query yet.
    carriers: Mutex<HashMap<TableName, Carrier>>,
    tables: Vec<BoundTable>,
}

/// A table of this query, checked, with what its writers need.
#[derive(Debug)]
struct BoundTable {
    name: TableName,
    files: Arc<FileLayout>,
    /// Where the files need columns that the table did not have when it was opened: its columns then.
    evolves: Option<Columns>,
}

/// What tells whether a table's columns have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Columns {
    schema_id: i32,
    last_column_id: i32,
}

impl Columns {
    fn of(metadata: &TableMetadata) -> Columns {
        Columns { schema_id: metadata.current_schema_id(), last_column_id: metadata.last_column_id() }
    }
}

impl BoundTable {
    /// The schema that the table has to get together with the files; none: it has it.
    fn evolution(&self, metadata: &TableMetadata) -> Result<Option<Schema>, Error> {
        let Some(columns) = self.evolves else { return Ok(None) };
        if evolution::same_schema(metadata, &self.files.schema).is_some() {
            return Ok(None);
        }
        if columns != Columns::of(metadata) {
            return Err(Error::transient(format!(
                "the columns of table {} were changed by another writer after it was opened: what was written for it has to be \
                 written anew",
                self.name
            )));
        }
        Ok(Some(self.files.schema.as_ref().clone()))
    }
}

impl IcebergSink {
    /// Loads every table, creates it where there is none; one that lacks columns gets them with its first commit. Fatal, and
    /// nothing is changed anywhere, when a table cannot be made to fit its spec.
    pub async fn open(
        catalog: &CatalogConfig,
        query_id: Uuid,
        pipeline: &str,
        specs: &[TableSpec],
    ) -> Result<IcebergSink, Error> {
        IcebergSink::open_if(catalog, query_id, pipeline, specs, |_| Ok(())).await
    }

    /// As [`IcebergSink::open`]; `agree` is shown those of the tables that there are, and may refuse before anything is created
    /// or changed.
    pub async fn open_if<E: From<Error>>(
        catalog: &CatalogConfig,
        query_id: Uuid,
        pipeline: &str,
        specs: &[TableSpec],
        agree: impl FnOnce(&[TableInfo]) -> Result<(), E>,
    ) -> Result<IcebergSink, E> {
        let storage = TableStorage::default();
        let file_io = storage.file_io();
        let there = open_read_only(catalog, &storage).await?;
        agree(&found(there.as_deref(), query_id, specs).await?)?;
        let catalog = match (catalog, there) {
            (CatalogConfig::Rest(_), Some(there)) => there,
            _ => open_catalog(catalog, &storage).await?,
        };
        let tables = plan::carry_out(catalog.as_ref(), pipeline, specs)
            .await?
            .into_iter()
            .zip(specs)
            .map(|(opened, spec)| bind(opened, spec, &file_io))
            .collect::<Result<_, _>>()?;
        let runtime = Handle::current();
        let marker_property = marker_property(query_id);
        let carriers = Mutex::default();
        Ok(IcebergSink(Arc::new(Inner {
            catalog,
            storage,
            file_io,
            runtime,
            query_id,
            marker_property,
            carriers,
            tables,
        })))
    }

    /// What a run would do to every table, found out without a change to anything.
    pub async fn plan(catalog: &CatalogConfig, specs: &[TableSpec]) -> Result<Vec<TablePlan>, Error> {
        let catalog = open_read_only(catalog, &TableStorage::default()).await?;
        let planned = plan::plan(catalog.as_deref(), specs).await?;
        Ok(planned.into_iter().map(|p| p.plan).collect())
    }

    /// Whether the tables of a batch appear at once, or else one after another.
    pub fn commits_together(&self) -> bool {
        self.0.catalog.commits_together()
    }

    /// Every table as it is now, in the order of the specs.
    pub async fn load(&self) -> Result<Vec<TableInfo>, Error> {
        let loaded = self.0.load_all().await?;
        self.0
            .tables
            .iter()
            .zip(loaded)
            .map(|(table, loaded)| TableInfo::of(&table.name, &loaded.metadata, self.0.query_id))
            .collect()
    }

    /// A writer for one worker; `table` counts in the order of the specs.
    pub fn writer(&self, table: usize, batch: BatchId, attempt: Uuid, worker: usize) -> TableWriter {
        let prefix = files::name_prefix(self.0.query_id, batch);
        TableWriter::new(self.0.tables[table].files.clone(), self.0.runtime.clone(), &prefix, attempt, worker)
    }

    /// A writer for rows that belong to no batch. No batch's files begin with `prefix`, so none tidies them away.
    pub fn writer_of(&self, table: usize, prefix: &str, attempt: Uuid) -> TableWriter {
        TableWriter::new(self.0.tables[table].files.clone(), self.0.runtime.clone(), prefix, attempt, 0)
    }

    /// Step 5 of the protocol. Safe to call again with the same batch: what is there is left alone.
    pub async fn commit(&self, commit: &BatchCommit) -> Result<Committed, Error> {
        self.0.commit(commit).await
    }

    /// What keeps the tables of this query small and fast.
    pub fn maintainer(&self) -> Maintainer {
        let inner = &self.0;
        let tables = inner.tables.iter().map(|table| table.name.clone()).collect();
        Maintainer::new(inner.catalog.clone(), inner.storage.clone(), tables)
    }

    /// Best effort: deletes the data files of an attempt that will not be committed.
    pub async fn discard(&self, files: impl IntoIterator<Item = &DataFile>) {
        let paths: Vec<String> = files.into_iter().map(|file| file.file_path().to_string()).collect();
        self.0.forget(paths.into_iter()).await;
    }

    /// Deletes data files of failed attempts at `batch` and returns how many. Only to be called once a commit has confirmed
    /// the marker in every table. Files that the batch's snapshot references stay; where that snapshot cannot be found,
    /// everything stays.
    pub async fn remove_failed_attempts(&self, batch: BatchId) -> Result<u64, Error> {
        self.0.remove_failed_attempts(batch).await
    }
}

impl Inner {
    async fn load_all(&self) -> Result<Vec<LoadedTable>, Error> {
        try_join_all(self.tables.iter().map(|table| async {
            self.catalog.load(&table.name).await?.ok_or_else(|| {
                Error::fatal(format!(
                    "table {} is gone: it was dropped while the pipeline used it. Restore it, or start with a new checkpoint",
                    table.name
                ))
            })
        }))
        .await
    }
}

/// Creates the embedded catalog where there is none yet.
async fn open_catalog(catalog: &CatalogConfig, storage: &TableStorage) -> Result<Arc<dyn Catalog>, Error> {
    Ok(match catalog {
        CatalogConfig::Sqlite { path, warehouse } => {
            Arc::new(sqlite::SqliteCatalog::open(path, warehouse, storage.file_io()).await?)
        }
        CatalogConfig::Rest(rest) => Arc::new(rest::RestCatalog::open(rest, storage.clone()).await?),
    })
}

/// A catalog to look at only. None where there is no catalog yet.
async fn open_read_only(catalog: &CatalogConfig, storage: &TableStorage) -> Result<Option<Arc<dyn Catalog>>, Error> {
    Ok(match catalog {
        CatalogConfig::Sqlite { path, warehouse } => {
            let catalog = sqlite::SqliteCatalog::open_read_only(path, warehouse, storage.file_io()).await?;
            catalog.map(|catalog| Arc::new(catalog) as Arc<dyn Catalog>)
        }
        CatalogConfig::Rest(rest) => Some(Arc::new(rest::RestCatalog::open(rest, storage.clone()).await?)),
    })
}

/// The tables of the specs that there are.
async fn found(catalog: Option<&dyn Catalog>, query_id: Uuid, specs: &[TableSpec]) -> Result<Vec<TableInfo>, Error> {
    let mut found = Vec::new();
    let Some(catalog) = catalog else { return Ok(found) };
    for spec in specs {
        let name = TableName::parse(&spec.name)?;
        let Some(LoadedTable { metadata, .. }) = catalog.load(&name).await? else { continue };
        found.push(TableInfo::of(&name, &metadata, query_id)?);
    }
    Ok(found)
}

fn bind(opened: Opened, spec: &TableSpec, file_io: &FileIO) -> Result<BoundTable, Error> {
    let Opened { name, metadata, evolved } = opened;
    let evolves = evolved.is_some().then(|| Columns::of(&metadata));
    let metadata = evolved.as_ref().unwrap_or(&metadata);
    if !layout::is_partitioned_as(spec, metadata) {
        tracing::warn!(table = %name, configured = ?spec.partition_by, "the existing table is partitioned differently; keeping its partitioning");
    }
    let ignored = files::without_effect(metadata.properties());
    if !ignored.is_empty() {
        tracing::warn!(table = %name, properties = ignored.join(", "), "table properties that floe does not heed when it writes files");
    }
    let files = FileLayout::of(&name, metadata, file_io)?;
    Ok(BoundTable { name, files: Arc::new(files), evolves })
}
