//! Reading tables back, and appending rows that are no batch of a query: what dead letters need.
//!
//! Owns: a table pinned at one metadata, the rows in it, and the append that happens only if the table still is what was
//! pinned. Does not own: batches and markers ([`super::commit`]); an append leaves every marker as it is.

use std::collections::{BTreeMap, HashMap, HashSet};

use arrow::record_batch::RecordBatch;
use futures::stream::{self, BoxStream};
use futures::{StreamExt, TryStreamExt};
use iceberg::arrow::ArrowReaderBuilder;
use iceberg::expr::{Bind, Predicate};
use iceberg::io::FileIO;
use iceberg::scan::FileScanTask;
use iceberg::spec::{
    DataContentType, DataFile, MAIN_BRANCH, Manifest, ManifestEntryRef, ManifestFile, ManifestList, SchemaRef, Snapshot,
};
use iceberg::table::Table;
use iceberg::{NamespaceIdent, Runtime, TableIdent};
use uuid::Uuid;

use super::catalog::{CommitError, LoadedTable, TableChange, TableName, iceberg_error};
use super::commit::{holds_any, may_delete_files};
use super::marker::{carried, markers, snapshot_of};
use super::storage::TableStorage;
use super::{IcebergSink, Marker, open_read_only};
use crate::batch::BatchId;
use crate::config::CatalogConfig;
use crate::sink::Error;

pub type Rows = BoxStream<'static, Result<RecordBatch, Error>>;

/// A table as it was when it was read; reading it again gives the same rows.
#[derive(Clone, Debug)]
pub struct PinnedTable {
    name: TableName,
    loaded: LoadedTable,
    file_io: FileIO,
}

/// What became of an append.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Append {
    Done {
        snapshot: i64,
    },
    /// Someone else has changed the table since it was pinned; nothing was done.
    Conflict,
}

impl PinnedTable {
    /// The table as it is now; none where there is no such table. Creates nothing.
    pub async fn open(catalog: &CatalogConfig, name: &str) -> Result<Option<PinnedTable>, Error> {
        let storage = TableStorage::default();
        let name = TableName::parse(name)?;
        let Some(catalog) = open_read_only(catalog, &storage).await? else { return Ok(None) };
        let file_io = storage.file_io();
        Ok(catalog.load(&name).await?.map(|loaded| PinnedTable { name, loaded, file_io }))
    }

    pub fn name(&self) -> String {
        self.name.to_string()
    }

    pub fn uuid(&self) -> Uuid {
        self.loaded.metadata.uuid()
    }

    /// What the last batch of a query has set, be it a property of the table or, where the catalog keeps none, of the
    /// snapshot that carries the marker.
    pub fn property(&self, query_id: Uuid, name: &str) -> Option<&str> {
        let metadata = &self.loaded.metadata;
        let (carrier, _) = carried(&self.name, metadata, query_id).ok().flatten()?;
        carrier.property(metadata, query_id, name)
    }

    /// The queries that have written to the table, each with the last batch that the table has of it.
    pub fn markers(&self) -> Vec<(Uuid, Marker)> {
        markers(&self.loaded.metadata)
    }

    /// The snapshot that holds a batch's rows; none where it had none or the snapshot has expired.
    pub fn snapshot_of(&self, query_id: Uuid, batch: BatchId) -> Option<i64> {
        let property = super::marker_property(query_id);
        snapshot_of(&self.loaded.metadata, &property, batch).map(|s| s.snapshot_id())
    }

    /// The newest value of an entry in the summaries of the snapshots that led to the table as it is.
    pub fn newest_summary(&self, entry: &str) -> Option<&str> {
        let metadata = &self.loaded.metadata;
        let ancestry = std::iter::successors(metadata.current_snapshot(), |snapshot| {
            metadata.snapshot_by_id(snapshot.parent_snapshot_id()?)
        });
        let mut values = ancestry.filter_map(|snapshot| snapshot.summary().additional_properties.get(entry));
        values.next().map(String::as_str)
    }

    pub fn has_column(&self, name: &str) -> bool {
        self.schema().field_by_name(name).is_some()
    }

    /// That of the rows: a column that was added since the last commit is not in it yet.
    fn schema(&self) -> SchemaRef {
        let metadata = &self.loaded.metadata;
        let of_rows = metadata.current_snapshot().and_then(|snapshot| snapshot.schema(metadata).ok());
        of_rows.unwrap_or_else(|| metadata.current_schema().clone())
    }

    /// The rows for which `filter` is true, read from no more files, row groups and columns than it takes.
    pub async fn scan(&self, columns: &[&str], filter: Option<Predicate>, batch_rows: usize) -> Result<Rows, Error> {
        let failed = self.failed();
        let namespace = NamespaceIdent::from_strs(self.name.namespace.split('.')).map_err(&failed)?;
        let table = Table::builder()
            .identifier(TableIdent::new(namespace, self.name.name.clone()))
            .metadata(self.loaded.metadata.clone())
            .metadata_location(self.loaded.metadata_location.clone())
            .file_io(self.file_io.clone())
            .runtime(Runtime::try_current().map_err(&failed)?)
            .build()
            .map_err(&failed)?;
        let mut scan = table.scan().select(columns).with_batch_size(Some(batch_rows));
        if let Some(filter) = filter {
            scan = scan.with_filter(filter);
        }
        let rows = scan.build().map_err(&failed)?.to_arrow().await.map_err(&failed)?;
        Ok(rows.map_err(self.failed()).boxed())
    }

    /// The rows that one snapshot has added; none where the snapshot is gone.
    pub async fn scan_added_by(
        &self,
        snapshot_id: i64,
        columns: &[&str],
        batch_rows: usize,
    ) -> Result<Option<Rows>, Error> {
        let Some(snapshot) = self.loaded.metadata.snapshot_by_id(snapshot_id) else { return Ok(None) };
        let list = self.manifests(snapshot).await?;
        let added = list.consume_entries().into_iter().filter(|m| m.added_snapshot_id == snapshot_id).collect();
        // A manifest of this snapshot may be a merged one, with entries of snapshots before it.
        self.scan_manifests(added, Some(snapshot_id), columns, None, batch_rows).await.map(Some)
    }

    /// The rows that may have come since `older` was pinned: those of all manifests that it did not have.
    pub async fn scan_since(
        &self,
        older: &PinnedTable,
        columns: &[&str],
        filter: Option<Predicate>,
        batch_rows: usize,
    ) -> Result<Rows, Error> {
        let new = self.manifests_since(older).await?;
        self.scan_manifests(new, None, columns, filter, batch_rows).await
    }

    async fn manifests_since(&self, older: &PinnedTable) -> Result<Vec<ManifestFile>, Error> {
        let Some(snapshot) = self.loaded.metadata.current_snapshot() else { return Ok(Vec::new()) };
        let known: HashSet<String> = match older.loaded.metadata.current_snapshot() {
            Some(snapshot) => {
                let list = older.manifests(snapshot).await?;
                list.consume_entries().into_iter().map(|m| m.manifest_path).collect()
            }
            None => HashSet::new(),
        };
        let list = self.manifests(snapshot).await?;
        Ok(list.consume_entries().into_iter().filter(|m| !known.contains(&m.manifest_path)).collect())
    }

    /// Whether a snapshot with these files is part of the table. By the files too: a catalog may show the newest snapshot
    /// only, and others have gone on since.
    async fn has_appended(&self, before: &PinnedTable, snapshot_id: i64, files: &[DataFile]) -> Result<bool, Error> {
        if self.loaded.metadata.snapshot_by_id(snapshot_id).is_some() {
            return Ok(true);
        }
        let new = self.manifests_since(before).await?;
        holds_any(&self.file_io, new, files).await.map_err(self.failed())
    }

    async fn manifests(&self, snapshot: &Snapshot) -> Result<ManifestList, Error> {
        let failed = self.failed();
        let bytes = self.read(snapshot.manifest_list()).await?;
        ManifestList::parse_with_version(&bytes, self.loaded.metadata.format_version()).map_err(failed)
    }

    async fn read(&self, location: &str) -> Result<bytes::Bytes, Error> {
        let failed = self.failed();
        self.file_io.new_input(location).map_err(&failed)?.read().await.map_err(&failed)
    }

    /// Every live row of the manifests' data files, or of those that one snapshot has added. Deletes that other engines have
    /// written are not applied.
    async fn scan_manifests(
        &self,
        manifests: Vec<ManifestFile>,
        added_by: Option<i64>,
        columns: &[&str],
        filter: Option<Predicate>,
        batch_rows: usize,
    ) -> Result<Rows, Error> {
        let failed = self.failed();
        let schema = self.schema();
        let fields: Vec<i32> = columns.iter().filter_map(|column| schema.field_id_by_name(column)).collect();
        let predicate =
            filter.map(|filter| filter.rewrite_not().bind(schema.clone(), true)).transpose().map_err(&failed)?;
        let mut tasks = Vec::new();
        for manifest in manifests {
            let manifest = Manifest::parse_avro(&self.read(&manifest.manifest_path).await?).map_err(&failed)?;
            let data = |content| content == DataContentType::Data;
            let wanted = |entry: &ManifestEntryRef| {
                // An entry without a snapshot is of the one that its manifest is of.
                let added = added_by.is_none_or(|snapshot| entry.snapshot_id().is_none_or(|id| id == snapshot));
                added && entry.is_alive() && data(entry.content_type())
            };
            for entry in manifest.entries().iter().filter(|entry| wanted(entry)) {
                let task = FileScanTask::builder()
                    .with_file_size_in_bytes(entry.file_size_in_bytes())
                    .with_start(0)
                    .with_length(entry.file_size_in_bytes())
                    .with_record_count(Some(entry.record_count()))
                    .with_data_file_path(entry.file_path().to_string())
                    .with_data_file_format(entry.file_format())
                    .with_schema(schema.clone())
                    .with_project_field_ids(fields.clone())
                    .with_predicate(predicate.clone())
                    .with_case_sensitive(true)
                    .build();
                tasks.push(Ok(task));
            }
        }
        let reader = ArrowReaderBuilder::new(self.file_io.clone(), Runtime::try_current().map_err(&failed)?)
            .with_batch_size(batch_rows)
            .build();
        let rows = reader.read(stream::iter(tasks).boxed()).map_err(&failed)?.stream();
        Ok(rows.map_err(self.failed()).boxed())
    }

    fn failed(&self) -> impl Fn(iceberg::Error) -> Error + Send + 'static {
        let name = self.name.clone();
        move |e| iceberg_error("read", &name, e)
    }
}

impl IcebergSink {
    /// A table as it is now; `table` counts in the order of the specs.
    pub async fn pin(&self, table: usize) -> Result<PinnedTable, Error> {
        let name = self.0.tables[table].name.clone();
        let loaded = self.0.catalog.load(&name).await?.ok_or_else(|| Error::fatal(format!("table {name} is gone")))?;
        Ok(PinnedTable { name, loaded, file_io: self.0.file_io.clone() })
    }

    /// Makes files visible in one table, if it still is what `base` pinned. No marker changes.
    pub async fn append(
        &self,
        table: usize,
        base: &PinnedTable,
        files: &[DataFile],
        summary: &BTreeMap<String, String>,
    ) -> Result<Append, Error> {
        let bound = &self.0.tables[table];
        let failed = |e| iceberg_error("append to", &bound.name, e);
        let properties: HashMap<String, String> = summary.clone().into_iter().collect();
        let evolution = bound.evolution(&base.loaded.metadata)?;
        let mut written = Vec::new();
        let appended = self.0.append(bound, &base.loaded, evolution.as_ref(), files, properties, &mut written).await;
        let snapshot = appended.map_err(failed)?;
        let snapshot_id = snapshot.snapshot_id();
        let change = TableChange::new(&bound.name, &base.loaded, |mut builder| {
            if let Some(schema) = evolution {
                builder = builder.add_current_schema(schema)?;
            }
            builder.set_branch_snapshot(snapshot, MAIN_BRANCH)
        });
        let change = change.map_err(failed)?;
        match self.0.catalog.commit(&[change]).await {
            Ok(()) => Ok(Append::Done { snapshot: snapshot_id }),
            Err(CommitError::Conflict(_)) => {
                // A proxy that has sent the request twice gets a conflict with itself.
                let now = self.pin(table).await?;
                if now.has_appended(base, snapshot_id, files).await? {
                    return Ok(Append::Done { snapshot: snapshot_id });
                }
                if may_delete_files(&now.loaded.metadata) {
                    self.0.forget(written.into_iter()).await;
                }
                Ok(Append::Conflict)
            }
            Err(CommitError::Failed(Error::Indeterminate { message })) => {
                let unknown = |e| Error::indeterminate(format!("{message}; {e}"));
                let now = self.pin(table).await.map_err(unknown)?;
                match now.has_appended(base, snapshot_id, files).await.map_err(unknown)? {
                    true => Ok(Append::Done { snapshot: snapshot_id }),
                    false => Err(Error::Indeterminate { message }),
                }
            }
            Err(CommitError::Failed(error)) => Err(error),
        }
    }
}
