//! Step 5 of the protocol: all tables of a batch, together, once.
//!
//! Owns: the snapshot that makes files visible, retries after conflicts. Does not own: what a marker is ([`super::marker`]),
//! atomicity over tables (the catalog's). Invariants: every attempt looks at the tables as they are now before it
//! changes them; the marker and the files of a batch appear in one and the same metadata; what others have written to
//! the table meanwhile is kept.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::PoisonError;
use std::time::Duration;

use futures::future::try_join_all;
use futures::{StreamExt, TryStreamExt};
use iceberg::io::FileIO;
use iceberg::spec::{
    DataFile, MAIN_BRANCH, Manifest, ManifestFile, ManifestList, ManifestWriterBuilder, Operation, Schema, Snapshot,
    SnapshotRef, SnapshotReference, SnapshotRetention, SnapshotSummaryCollector, TableMetadata,
};
use object_store::ObjectStoreExt;
use uuid::Uuid;

use super::catalog::{CommitError, LoadedTable, TableChange, TableName, iceberg_error};
use super::manifests::Merge;
use super::marker::{Carrier, Marker, carried, marker_tag, snapshot_of};
use super::snapshot::{NextSnapshot, manifest_list, new_snapshot_id};
use super::{BoundTable, Inner, evolution, files, probe};
use crate::batch::BatchId;
use crate::retry::{Strategy, random};
use crate::sink::Error;

const ATTEMPTS: u32 = 20;
const BACKOFF: Strategy = Strategy::Exponential { initial: Duration::from_millis(20), max: Duration::from_secs(2) };

#[derive(Clone, Debug)]
pub struct BatchCommit {
    pub marker: Marker,
    /// UUIDs that the plan recorded, by table name.
    pub tables: BTreeMap<String, Uuid>,
    /// Goes into the summary of every new snapshot: offset ranges, watermark.
    pub summary: BTreeMap<String, String>,
    /// What the batch sets in every table beside the marker.
    pub properties: BTreeMap<String, String>,
    /// New data files, by table in the order of the specs.
    pub files: Vec<Vec<DataFile>>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Committed {
    /// The tables had the batch before this call.
    pub already: bool,
    /// The snapshot that holds the batch's rows, by table; none where there were no rows or it has expired.
    pub snapshots: Vec<Option<i64>>,
}

/// What a table says about a batch.
#[derive(Debug, PartialEq)]
enum Standing {
    Done,
    Pending,
}

impl Inner {
    pub(super) async fn commit(&self, commit: &BatchCommit) -> Result<Committed, Error> {
        if commit.files.len() != self.tables.len() {
            return Err(Error::fatal(format!("a commit of {} tables for {}", commit.files.len(), self.tables.len())));
        }
        let mut conflict = String::new();
        // By table: manifests of attempts that met a conflict.
        let mut overtaken: Vec<Vec<String>> = vec![Vec::new(); self.tables.len()];
        'attempts: for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                tokio::time::sleep(BACKOFF.delay(attempt - 1, random())).await;
            }
            let mut loaded = self.load_all().await?;
            let standing = self.standing(&loaded, commit)?;
            // Only where the batch is not in the table: a server that answers for several tables at once may have changed
            // some of them before the conflict, and one that a proxy has asked twice conflicts with itself.
            for (overtaken, standing) in overtaken.iter_mut().zip(&standing) {
                let written = std::mem::take(overtaken);
                if *standing == Standing::Pending {
                    self.forget(written.into_iter()).await;
                }
            }
            if standing.iter().all(|s| *s == Standing::Done) {
                return Ok(Committed { already: true, snapshots: self.snapshots_of(&loaded, commit.marker.batch) });
            }
            let pending: Vec<usize> = (0..loaded.len()).filter(|&i| standing[i] == Standing::Pending).collect();
            let staged = pending.iter().map(|&i| self.stage(i, &loaded[i], commit));
            let staged: Vec<Staged> = try_join_all(staged).await?;
            let together = if self.catalog.commits_together() { staged.len() } else { 1 };
            let mut staged = staged.into_iter().peekable();
            while staged.peek().is_some() {
                let (mut changes, mut written) = (Vec::new(), Vec::new());
                for Staged { index, change, manifests } in staged.by_ref().take(together) {
                    changes.push(change);
                    written.push((index, manifests));
                }
                match self.catalog.commit(&changes).await {
                    // A server may check each table of a request, meet a faster writer after that, and still report success
                    // of what it has not done. So what several tables are said to have is looked at.
                    Ok(()) if changes.len() > 1 && !self.catalog.guards_properties() => {
                        let now = self.load_all().await.map_err(|e| {
                            Error::indeterminate(format!("the catalog reports a commit that cannot be looked at: {e}"))
                        })?;
                        let standing = self.standing(&now, commit)?;
                        if written.iter().any(|(i, _)| standing[*i] == Standing::Pending) {
                            conflict = "the catalog reported success, and a table does not have the batch".to_string();
                            tracing::warn!(batch = commit.marker.batch, attempt, "{conflict}; trying again");
                            continue 'attempts;
                        }
                        written.iter().for_each(|(i, _)| loaded[*i] = now[*i].clone());
                    }
                    Ok(()) => {
                        for ((i, _), change) in written.iter().zip(changes) {
                            loaded[*i].metadata = change.metadata.into();
                        }
                    }
                    Err(CommitError::Conflict(message)) => {
                        tracing::debug!(batch = commit.marker.batch, attempt, message, "commit conflict; reloading");
                        written.into_iter().for_each(|(i, manifests)| overtaken[i].extend(manifests));
                        conflict = message;
                        continue 'attempts;
                    }
                    Err(CommitError::Failed(Error::Indeterminate { message })) => {
                        let now = self.load_all().await.map_err(|e| Error::indeterminate(format!("{message}; {e}")))?;
                        let standing = self.standing(&now, commit)?;
                        if written.iter().any(|(i, _)| standing[*i] == Standing::Pending) {
                            return Err(Error::Indeterminate { message });
                        }
                        tracing::debug!(
                            batch = commit.marker.batch,
                            message,
                            "a commit of unknown outcome has happened"
                        );
                        written.iter().for_each(|(i, _)| loaded[*i] = now[*i].clone());
                    }
                    Err(CommitError::Failed(error)) => return Err(error),
                }
            }
            return Ok(Committed { already: false, snapshots: self.snapshots_of(&loaded, commit.marker.batch) });
        }
        let batch = commit.marker.batch;
        Err(Error::transient(format!("batch {batch}: other writers were faster in {ATTEMPTS} attempts: {conflict}")))
    }

    /// What carries the marker; tried out the first time that a table gets one from this query.
    async fn carrier(&self, table: &TableName, metadata: &TableMetadata) -> Result<Carrier, Error> {
        if let Some((carrier, _)) = carried(table, metadata, self.query_id)? {
            return Ok(carrier);
        }
        if self.catalog.guards_properties() {
            return Ok(Carrier::Property);
        }
        let known = self.carriers.lock().unwrap_or_else(PoisonError::into_inner).get(table).copied();
        if let Some(carrier) = known {
            return Ok(carrier);
        }
        let carrier = match probe::properties(self.catalog.as_ref(), table).await? {
            probe::Properties::Kept => Carrier::Property,
            probe::Properties::Refused(why) => {
                let tag = marker_tag(self.query_id);
                tracing::warn!(table = %table, why, tag, "the catalog keeps no property of Floe's; a tag carries the marker");
                Carrier::Tag
            }
        };
        self.carriers.lock().unwrap_or_else(PoisonError::into_inner).insert(table.clone(), carrier);
        Ok(carrier)
    }

    /// Where every table stands with regard to the batch, or why the batch must not be committed at all.
    fn standing(&self, loaded: &[LoadedTable], commit: &BatchCommit) -> Result<Vec<Standing>, Error> {
        let Marker { batch, plan, .. } = &commit.marker;
        let mut standing = Vec::with_capacity(loaded.len());
        for (table, loaded) in self.tables.iter().zip(loaded) {
            let uuid = loaded.metadata.uuid();
            if let Some(planned) = commit.tables.get(&table.name.to_string()).filter(|planned| **planned != uuid) {
                return Err(Error::fatal(format!(
                    "table {} was dropped and re-created: batch {batch} was planned for uuid {planned}, the table now is {uuid}. \
                     Restore the table, or start the pipeline with a new checkpoint",
                    table.name
                )));
            }
            standing.push(match carried(&table.name, &loaded.metadata, self.query_id)?.map(|(_, marker)| marker) {
                Some(found) if found.batch == *batch && found.plan == *plan => Standing::Done,
                Some(found) if found.batch >= *batch => {
                    return Err(Error::fatal(format!(
                        "this checkpoint is older than table {}: it is about to commit batch {batch} (plan {plan}), \
                         the table has batch {} (plan {}). Going on would lose or double rows. Restore the checkpoint that belongs \
                         to the table; or roll the table back and remove its property {}; or start with a new checkpoint and, \
                         for a clean start, new tables",
                        table.name, found.batch, found.plan, self.marker_property
                    )));
                }
                _ => Standing::Pending,
            });
        }
        Ok(standing)
    }

    fn snapshots_of(&self, loaded: &[LoadedTable], batch: BatchId) -> Vec<Option<i64>> {
        loaded.iter().map(|l| self.snapshot_of(&l.metadata, batch).map(|s| s.snapshot_id())).collect()
    }

    /// The snapshot that a batch of this query has added.
    fn snapshot_of<'a>(&self, metadata: &'a TableMetadata, batch: BatchId) -> Option<&'a SnapshotRef> {
        snapshot_of(metadata, &self.marker_property, batch)
    }

    /// Writes manifest and manifest list, if there are files or the marker needs a snapshot, and makes the table's next
    /// metadata.
    async fn stage(&self, index: usize, loaded: &LoadedTable, commit: &BatchCommit) -> Result<Staged, Error> {
        let (table, files) = (&self.tables[index], &commit.files[index]);
        let failed = |e| iceberg_error("commit to", &table.name, e);
        let marker = serde_json::to_string(&commit.marker)
            .map_err(|e| Error::fatal(format!("the marker has no JSON form: {e}")))?;
        let carrier = self.carrier(&table.name, &loaded.metadata).await?;
        let evolution = table.evolution(&loaded.metadata)?;
        let mut manifests = Vec::new();
        let mut snapshot = None;
        // Without files too where nothing else keeps a late request from setting the marker back.
        if !files.is_empty() || !self.catalog.guards_properties() {
            let mut properties: HashMap<String, String> = commit.summary.clone().into_iter().collect();
            if carrier == Carrier::Tag {
                properties.extend(commit.properties.clone());
            }
            properties.insert(self.marker_property.clone(), marker.clone());
            let appended = self.append(table, loaded, evolution.as_ref(), files, properties, &mut manifests).await;
            snapshot = Some(appended.map_err(failed)?);
        }
        let mut properties: HashMap<String, String> = commit.properties.clone().into_iter().collect();
        properties.insert(self.marker_property.clone(), marker);
        let change = TableChange::new(&table.name, loaded, |mut builder| {
            if let Some(schema) = evolution {
                builder = builder.add_current_schema(schema)?;
            }
            if carrier == Carrier::Property {
                builder = builder.set_properties(properties)?;
            }
            if let Some(snapshot) = snapshot {
                let snapshot_id = snapshot.snapshot_id();
                // Unlike setting the reference, this keeps the retention that the user gave the branch.
                builder = builder.set_branch_snapshot(snapshot, MAIN_BRANCH)?;
                if carrier == Carrier::Tag {
                    // For ever, whatever the table says about tags: an engine that expires must not take it away.
                    let retention = SnapshotRetention::Tag { max_ref_age_ms: Some(i64::MAX) };
                    builder =
                        builder.set_ref(&marker_tag(self.query_id), SnapshotReference { snapshot_id, retention })?;
                }
            }
            Ok(builder)
        });
        Ok(Staged { index, change: change.map_err(failed)?, manifests })
    }

    /// The next snapshot. `evolution` is the schema that the table gets together with it.
    pub(super) async fn append(
        &self,
        table: &BoundTable,
        loaded: &LoadedTable,
        evolution: Option<&Schema>,
        files: &[DataFile],
        properties: HashMap<String, String>,
        written: &mut Vec<String>,
    ) -> iceberg::Result<Snapshot> {
        let evolved = evolution.map(|schema| evolution::apply(&table.name, loaded, schema.clone())).transpose()?;
        let metadata = evolved.as_ref().map_or(loaded.metadata.as_ref(), |change| &change.metadata);
        let parent = metadata.current_snapshot();
        let snapshot_id = new_snapshot_id(metadata);
        let folder = format!("{}/metadata", metadata.location().trim_end_matches('/'));
        let attempt = Uuid::new_v4();

        // The spec and schema that the files were written with: the table's may have evolved since.
        let gone = |what: &str| {
            let message = format!("the {what} that the files were written with is gone from the table");
            iceberg::Error::new(iceberg::ErrorKind::DataInvalid, message)
        };
        let spec_id = table.files.spec.spec_id();
        let spec = metadata.partition_spec_by_id(spec_id).ok_or_else(|| gone("partition spec"))?;
        let schema = evolution::same_schema(metadata, &table.files.schema).ok_or_else(|| gone("schema"))?;
        let schema_id = schema.schema_id();

        let mut list_of: Vec<ManifestFile> = Vec::new();
        if !files.is_empty() {
            let manifest_path = format!("{folder}/{attempt}-m0.avro");
            written.push(manifest_path.clone());
            let output = self.file_io.new_output(manifest_path)?;
            let mut manifest =
                ManifestWriterBuilder::new(output, Some(snapshot_id), schema.clone(), spec.as_ref().clone())
                    .build_v2_data();
            for file in files {
                // No sequence number: readers inherit it from the manifest list.
                manifest.add_file(file.clone(), iceberg::spec::UNASSIGNED_SEQUENCE_NUMBER)?;
            }
            list_of.push(manifest.write_manifest_file().await?);
        }
        let new = list_of.len();

        // Every manifest of the parent is taken over, small ones merged when there are many.
        let mut counts = HashMap::from([("manifests-created", new), ("manifests-kept", 0), ("manifests-replaced", 0)]);
        if let Some(parent) = parent {
            // Those with nothing but deleted entries have said what they had to.
            let is_alive = |m: &ManifestFile| m.has_added_files() || m.has_existing_files();
            let parents =
                self.manifests(metadata, parent).await?.consume_entries().into_iter().filter(is_alive).collect();
            let path = |n: usize| format!("{folder}/{attempt}-m{n}.avro");
            let merge = Merge { file_io: &self.file_io, metadata, spec_id, schema, snapshot_id };
            let merged = merge.run(parents, path, written).await;
            counts.insert("manifests-created", new + merged.created);
            counts.insert("manifests-kept", merged.manifests.len() - merged.created);
            counts.insert("manifests-replaced", merged.replaced);
            counts.insert("entries-processed", merged.entries);
            list_of.extend(merged.manifests);
        }

        let mut collector = SnapshotSummaryCollector::default();
        for file in files {
            collector.add_file(file, schema.clone(), spec.clone());
        }
        let mut properties = properties;
        properties.extend(counts.into_iter().map(|(key, count)| (key.to_string(), count.to_string())));
        properties.extend(collector.build());
        let next = NextSnapshot { snapshot_id, attempt, operation: Operation::Append, schema_id, properties };
        next.write(&self.file_io, metadata, list_of, written).await
    }

    async fn manifests(&self, metadata: &TableMetadata, snapshot: &Snapshot) -> iceberg::Result<ManifestList> {
        manifest_list(&self.file_io, metadata, snapshot).await
    }

    pub(super) async fn remove_failed_attempts(&self, batch: BatchId) -> Result<u64, Error> {
        let mut removed = 0;
        let prefix = files::name_prefix(self.query_id, batch);
        for (table, loaded) in self.tables.iter().zip(self.load_all().await?) {
            let failed = |e| iceberg_error("tidy", &table.name, e);
            let Some(snapshot) = self.snapshot_of(&loaded.metadata, batch) else { continue };
            let mut referenced = HashSet::new();
            let list = self.manifests(&loaded.metadata, snapshot).await.map_err(failed)?;
            for manifest in list.entries().iter().filter(|m| m.added_snapshot_id == snapshot.snapshot_id()) {
                let bytes = self.read(&manifest.manifest_path).await.map_err(failed)?;
                for entry in Manifest::parse_avro(&bytes).map_err(failed)?.entries() {
                    referenced.insert(entry.file_path().rsplit('/').next().unwrap_or_default().to_string());
                }
            }
            if referenced.is_empty() {
                continue;
            }
            let (store, folder) = self.storage.locate(&table.files.data_location).map_err(failed)?;
            let listing =
                |e| Error::transient(format!("table {}: cannot remove files of failed attempts: {e}", table.name));
            let leftover: Vec<_> = store
                .list(Some(&folder))
                .map_ok(|meta| meta.location)
                .try_filter(|path| {
                    let name = path.filename().unwrap_or_default();
                    futures::future::ready(name.starts_with(&prefix) && !referenced.contains(name))
                })
                .try_collect()
                .await
                .map_err(listing)?;
            for path in leftover {
                match store.delete(&path).await {
                    Ok(()) => removed += 1,
                    Err(object_store::Error::NotFound { .. }) => {}
                    Err(e) => return Err(listing(e)),
                }
            }
        }
        Ok(removed)
    }

    async fn read(&self, location: &str) -> iceberg::Result<bytes::Bytes> {
        self.file_io.new_input(location)?.read().await
    }

    /// Best effort: files of an attempt that certainly was not committed.
    pub(super) async fn forget(&self, written: impl Iterator<Item = String>) {
        delete_all(&self.file_io, written.collect()).await;
    }
}

/// Not with `gc.enabled = false`: another table may use the same files, or the catalog keep a history that the table does
/// not show.
pub(super) fn may_delete_files(metadata: &TableMetadata) -> bool {
    metadata.properties().get("gc.enabled").is_none_or(|enabled| !enabled.eq_ignore_ascii_case("false"))
}

/// Whether one of the files is in one of the manifests.
pub(super) async fn holds_any(
    file_io: &FileIO,
    manifests: Vec<ManifestFile>,
    files: &[DataFile],
) -> iceberg::Result<bool> {
    let files: HashSet<&str> = files.iter().map(DataFile::file_path).collect();
    for manifest in manifests {
        let manifest = manifest.load_manifest(file_io).await?;
        if manifest.entries().iter().any(|entry| entry.is_alive() && files.contains(entry.file_path())) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Best effort: files that certainly nothing references. Returns how many are gone.
pub(super) async fn delete_all(file_io: &FileIO, locations: Vec<String>) -> u64 {
    let delete = |location: String| {
        let file_io = file_io.clone();
        async move {
            match file_io.delete(&location).await {
                Ok(()) => 1,
                Err(error) => {
                    tracing::debug!(location, %error, "could not delete a file that is not needed");
                    0
                }
            }
        }
    };
    let deleting: Vec<_> = locations.into_iter().map(delete).collect();
    let gone: Vec<u64> = futures::stream::iter(deleting).buffer_unordered(8).collect().await;
    gone.into_iter().sum()
}

struct Staged {
    /// In the order of the specs.
    index: usize,
    change: TableChange,
    /// Manifests and manifest list that were written for it.
    manifests: Vec<String>,
}
