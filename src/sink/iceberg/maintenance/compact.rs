//! Small data files made into larger ones, a partition at a time.
//!
//! Owns: finding them, and the `replace` snapshot that puts one file in the place of many. Invariants: a file is replaced
//! only if the table still has it when the snapshot is made; partitions in which other engines have deleted rows by delete
//! files are left to these engines; the new files have as many rows as the old ones.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use futures::StreamExt;
use iceberg::spec::{
    DataFile, DataFileFormat, MAIN_BRANCH, ManifestContentType, ManifestFile, ManifestWriterBuilder, Operation,
    PrimitiveLiteral, PrimitiveType, SnapshotSummaryCollector, Struct, TableMetadata, UNASSIGNED_SEQUENCE_NUMBER,
};
use uuid::Uuid;

use super::expire::{ATTEMPTS, BACKOFF, fail_at};
use super::reach::read_all;
use super::small::{Group, Partition, PartitionTime, Rules, SmallFile};
use super::{Maintainer, Round, SUMMARY_PROPERTY, TableReport, rewrite};
use crate::retry::random;
use crate::sink::Error;
use crate::sink::iceberg::catalog::{CommitError, LoadedTable, TableChange, TableName, iceberg_error};
use crate::sink::iceberg::commit::{delete_all, holds_any, may_delete_files};
use crate::sink::iceberg::files::FileLayout;
use crate::sink::iceberg::manifests::{Merge, Policy};
use crate::sink::iceberg::snapshot::{NextSnapshot, manifest_list, new_snapshot_id};

/// Rows of a sorted table are merged from all files of a group at once, so their size bounds the memory that takes.
const MAX_SORTED_BYTES: u64 = 256 << 20;

/// What a table's current snapshot has, as far as compaction goes by it.
pub(super) struct Found {
    pub groups: Vec<Group>,
    /// Manifests that were read: what they hold is known for ever.
    known: HashSet<String>,
}

impl Found {
    /// A manifest that may hold anything.
    fn is_new(&self, manifest: &ManifestFile, spec_id: i32) -> bool {
        is_ours(manifest, spec_id) && !self.known.contains(&manifest.manifest_path)
    }
}

impl Maintainer {
    pub(super) async fn compact(
        &self,
        table: &TableName,
        round: &Round,
        report: &mut TableReport,
    ) -> Result<(), Error> {
        let failed = |e| iceberg_error("compact", table, e);
        let Some(loaded) = self.load(table).await? else { return Ok(()) };
        let layout = FileLayout::of(table, &loaded.metadata, &self.file_io)?;
        let found = self.find(&loaded.metadata, &layout, round).await.map_err(failed)?;
        let layout = Arc::new(layout);
        let mut failure = None;
        for group in &found.groups {
            if round.over() {
                break;
            }
            if round.dry_run {
                report.files_compacted += group.files.len() as u64;
                report.bytes_compacted += group.bytes();
            } else if let Err(error) = self.compact_group(table, &loaded, &layout, group, &found, round, report).await {
                // A file that cannot be read must not keep other partitions from being compacted.
                failure.get_or_insert(error);
            }
        }
        if report.files_compacted > 0 && !round.dry_run {
            tracing::info!(%table, files = report.files_compacted, into = report.files_written, bytes = report.bytes_compacted, "small files compacted");
        }
        failure.map_or(Ok(()), Err)
    }

    #[allow(clippy::too_many_arguments)]
    async fn compact_group(
        &self,
        table: &TableName,
        planned: &LoadedTable,
        layout: &Arc<FileLayout>,
        group: &Group,
        found: &Found,
        round: &Round,
        report: &mut TableReport,
    ) -> Result<(), Error> {
        let Some(files) = rewrite::rewrite(layout, group, round).await? else { return Ok(()) };
        fail_at("maintenance.rewritten")?;
        if self.replace(table, planned, layout, group, found, &files).await? {
            report.files_compacted += group.files.len() as u64;
            report.files_written += files.len() as u64;
            report.bytes_compacted += group.bytes();
            fail_at("maintenance.replaced")?;
        }
        Ok(())
    }

    pub(super) async fn find(
        &self,
        metadata: &TableMetadata,
        layout: &FileLayout,
        round: &Round,
    ) -> iceberg::Result<Found> {
        let mut found = Found { groups: Vec::new(), known: HashSet::new() };
        let Some(snapshot) = metadata.current_snapshot() else { return Ok(found) };
        let manifests: Vec<ManifestFile> =
            manifest_list(&self.file_io, metadata, snapshot).await?.consume_entries().into_iter().collect();
        let spec_id = layout.spec.spec_id();
        let Some(with_deletes) = self.with_deletes(&manifests, spec_id).await? else { return Ok(found) };

        let target = layout.target_file_bytes as u64;
        let mut rules = Rules {
            policy: &round.policy,
            target_bytes: if layout.order.is_some() { target.min(MAX_SORTED_BYTES) } else { target },
            now_ms: chrono::Utc::now().timestamp_millis(),
            time: PartitionTime::of(&layout.spec, &layout.schema),
            newest_us: None,
        };
        // A file of a snapshot that has expired was written before those that are kept.
        let oldest_ms = metadata.snapshots().map(|s| s.timestamp_ms()).min().unwrap_or_default();
        let mut partitions: HashMap<Struct, Partition> = HashMap::new();
        let mut reading = read_all(&self.file_io, manifests.into_iter().filter(|m| is_ours(m, spec_id)).collect());
        while let Some((manifest, loaded)) = reading.next().await {
            if round.over() {
                break;
            }
            let loaded = loaded?;
            let manifest_path: Arc<str> = manifest.manifest_path.as_str().into();
            for entry in loaded.entries().iter().filter(|entry| entry.is_alive()) {
                let file = entry.data_file();
                if let Some(time) = &rules.time {
                    rules.newest_us = rules.newest_us.max(latest_us(file, time.source_id));
                }
                let partition = partitions.entry(file.partition().clone()).or_default();
                let written = entry.snapshot_id().and_then(|id| metadata.snapshot_by_id(id)).map(|s| s.timestamp_ms());
                partition.last_written_ms = partition.last_written_ms.max(written.unwrap_or(oldest_ms));
                if rules.is_small(file.file_size_in_bytes()) && file.file_format() == DataFileFormat::Parquet {
                    partition.files.push(SmallFile {
                        path: file.file_path().to_string(),
                        manifest: manifest_path.clone(),
                        bytes: file.file_size_in_bytes(),
                        records: file.record_count(),
                        sequence_number: entry.sequence_number().unwrap_or_default(),
                        sorted: layout.order.as_ref().is_some_and(|order| file.sort_order_id() == Some(order.id())),
                    });
                }
            }
            found.known.insert(manifest.manifest_path);
        }
        partitions.retain(|partition, _| !with_deletes.contains(partition));
        found.groups = rules.groups(partitions);
        Ok(found)
    }

    /// The partitions to which delete files apply. None: they may apply to any.
    async fn with_deletes(&self, manifests: &[ManifestFile], spec_id: i32) -> iceberg::Result<Option<HashSet<Struct>>> {
        let is_alive = |m: &&ManifestFile| m.has_added_files() || m.has_existing_files();
        let deletes = manifests.iter().filter(|m| m.content == ManifestContentType::Deletes).filter(is_alive);
        let deletes: Vec<ManifestFile> = deletes.cloned().collect();
        if deletes.iter().any(|m| m.partition_spec_id != spec_id) {
            return Ok(None);
        }
        let mut partitions = HashSet::new();
        let mut reading = read_all(&self.file_io, deletes);
        while let Some((_, loaded)) = reading.next().await {
            let loaded = loaded?;
            let alive = loaded.entries().iter().filter(|entry| entry.is_alive());
            partitions.extend(alive.map(|entry| entry.data_file().partition().clone()));
        }
        Ok(Some(partitions))
    }

    /// Puts `files` in the place of the group. False, and the files are deleted, where someone else has changed what they
    /// were made of.
    pub(super) async fn replace(
        &self,
        table: &TableName,
        planned: &LoadedTable,
        layout: &FileLayout,
        group: &Group,
        found: &Found,
        files: &[DataFile],
    ) -> Result<bool, Error> {
        let failed = |e| iceberg_error("compact", table, e);
        let paths = || files.iter().map(|file| file.file_path().to_string()).collect::<Vec<_>>();
        let mut deletes = true;
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                tokio::time::sleep(BACKOFF.delay(attempt - 1, random())).await;
            }
            let Some(loaded) = self.load(table).await? else { break };
            if loaded.metadata.uuid() != planned.metadata.uuid() {
                break;
            }
            let mut written = Vec::new();
            let staged = self.stage(table, &loaded, layout, group, found, files, &mut written).await.map_err(failed)?;
            let Some((change, snapshot_id)) = staged else {
                delete_all(&self.file_io, written).await;
                break;
            };
            match self.catalog.commit(&[change]).await {
                Ok(()) => return Ok(true),
                Err(CommitError::Conflict(_)) => {
                    // A proxy that has sent the request twice gets a conflict with itself.
                    let Some(now) = self.load(table).await? else { break };
                    if self.has_replaced(&now.metadata, snapshot_id, layout, found, files).await.map_err(failed)? {
                        return Ok(true);
                    }
                    // Where others keep a history that the table does not show, it may have been there and gone again.
                    deletes = may_delete_files(&now.metadata);
                    if deletes {
                        delete_all(&self.file_io, written).await;
                    }
                }
                // Whatever the table says now, the commit may still be on its way: nothing is deleted.
                Err(CommitError::Failed(Error::Indeterminate { message })) => {
                    let now = self.load(table).await.map_err(|e| Error::indeterminate(format!("{message}; {e}")))?;
                    return match now.and_then(|now| now.metadata.snapshot_by_id(snapshot_id).cloned()) {
                        Some(_) => Ok(true),
                        None => Err(Error::Indeterminate { message }),
                    };
                }
                Err(CommitError::Failed(error)) => return Err(error),
            }
        }
        tracing::debug!(%table, "compacted files are dropped: others have changed the table");
        if deletes {
            delete_all(&self.file_io, paths()).await;
        }
        Ok(false)
    }

    /// Whether this round's own commit is in the table. By its files too: a catalog may show the newest snapshot only, and
    /// batches have gone on since.
    async fn has_replaced(
        &self,
        now: &TableMetadata,
        snapshot_id: i64,
        layout: &FileLayout,
        found: &Found,
        files: &[DataFile],
    ) -> iceberg::Result<bool> {
        if now.snapshot_by_id(snapshot_id).is_some() {
            return Ok(true);
        }
        let Some(current) = now.current_snapshot() else { return Ok(false) };
        let manifests = manifest_list(&self.file_io, now, current).await?.consume_entries().into_iter();
        let new = manifests.filter(|m| found.is_new(m, layout.spec.spec_id())).collect();
        holds_any(&self.file_io, new, files).await
    }

    /// None where a file of the group is no longer in the table, or rows of the partition were deleted.
    #[allow(clippy::too_many_arguments)]
    async fn stage(
        &self,
        table: &TableName,
        loaded: &LoadedTable,
        layout: &FileLayout,
        group: &Group,
        found: &Found,
        files: &[DataFile],
        written: &mut Vec<String>,
    ) -> iceberg::Result<Option<(TableChange, i64)>> {
        let metadata = &loaded.metadata;
        let spec_id = layout.spec.spec_id();
        let (Some(current), Some(spec), Some(schema)) = (
            metadata.current_snapshot(),
            metadata.partition_spec_by_id(spec_id),
            metadata.schema_by_id(layout.schema.schema_id()),
        ) else {
            return Ok(None);
        };
        let manifests: Vec<ManifestFile> =
            manifest_list(&self.file_io, metadata, current).await?.consume_entries().into_iter().collect();
        match self.with_deletes(&manifests, spec_id).await? {
            Some(partitions) if !partitions.contains(&group.partition) => {}
            _ => return Ok(None),
        }

        // A batch may have merged manifests meanwhile: those that are new have to be looked into.
        let removed: HashSet<String> = group.files.iter().map(|file| file.path.clone()).collect();
        let mut affected: HashSet<String> = group.files.iter().map(|file| file.manifest.to_string()).collect();
        let mut reading =
            read_all(&self.file_io, manifests.iter().filter(|m| found.is_new(m, spec_id)).cloned().collect());
        while let Some((manifest, read)) = reading.next().await {
            if read?.entries().iter().any(|entry| entry.is_alive() && removed.contains(entry.file_path())) {
                affected.insert(manifest.manifest_path);
            }
        }
        let (affected, kept): (Vec<ManifestFile>, Vec<ManifestFile>) =
            manifests.into_iter().partition(|m| affected.contains(&m.manifest_path));

        let snapshot_id = new_snapshot_id(metadata);
        let attempt = Uuid::new_v4();
        let folder = format!("{}/metadata", metadata.location().trim_end_matches('/'));
        let path = |n: usize| format!("{folder}/{attempt}-m{n}.avro");
        written.push(path(0));
        let output = self.file_io.new_output(path(0))?;
        let mut added = ManifestWriterBuilder::new(output, Some(snapshot_id), schema.clone(), spec.as_ref().clone())
            .build_v2_data();
        let mut collector = SnapshotSummaryCollector::default();
        for file in files {
            added.add_file(file.clone(), UNASSIGNED_SEQUENCE_NUMBER)?;
            collector.add_file(file, schema.clone(), spec.clone());
        }
        let mut list_of = vec![added.write_manifest_file().await?];

        // What is left of the manifests that had the old files.
        let merge = Merge { file_io: &self.file_io, metadata, spec_id, schema, snapshot_id };
        let target_bytes = Policy::of(metadata.properties()).target_bytes;
        let mut deleted = 0;
        let mut rest: &[ManifestFile] = &affected;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = rest.iter().take_while(|m| {
                bytes += m.manifest_length;
                bytes <= target_bytes
            });
            let (members, others) = rest.split_at(fits.count().max(1));
            rest = others;
            let members: Vec<&ManifestFile> = members.iter().collect();
            let rewritten = merge.rewrite(&members, &removed, path, written).await?;
            deleted += rewritten.deleted;
            list_of.extend(rewritten.manifests);
        }
        if deleted != group.files.len() {
            return Ok(None);
        }
        let created = list_of.len();
        let kept_count = kept.len();
        list_of.extend(kept);

        let mut properties = collector.build();
        let removed_records: u64 = group.files.iter().map(|file| file.records).sum();
        for (key, value) in [
            (SUMMARY_PROPERTY, "compaction".to_string()),
            ("deleted-data-files", group.files.len().to_string()),
            ("deleted-records", removed_records.to_string()),
            ("removed-files-size", group.bytes().to_string()),
            ("manifests-created", created.to_string()),
            ("manifests-kept", kept_count.to_string()),
            ("manifests-replaced", affected.len().to_string()),
        ] {
            properties.insert(key.to_string(), value);
        }
        let schema_id = schema.schema_id();
        let next = NextSnapshot { snapshot_id, attempt, operation: Operation::Replace, schema_id, properties };
        let snapshot = next.write(&self.file_io, metadata, list_of, written).await?;
        let change = TableChange::new(table, loaded, |builder| builder.set_branch_snapshot(snapshot, MAIN_BRANCH))?;
        Ok(Some((change, snapshot_id)))
    }
}

fn is_ours(manifest: &ManifestFile, spec_id: i32) -> bool {
    manifest.content == ManifestContentType::Data
        && manifest.partition_spec_id == spec_id
        && manifest.key_metadata.is_none()
        && (manifest.has_added_files() || manifest.has_existing_files())
}

/// The upper bound of a column of time.
fn latest_us(file: &DataFile, column: i32) -> Option<i64> {
    let bound = file.upper_bounds().get(&column)?;
    match (bound.data_type(), bound.literal()) {
        (PrimitiveType::Date, PrimitiveLiteral::Int(days)) => i64::from(*days).checked_mul(86_400_000_000),
        (PrimitiveType::Timestamp | PrimitiveType::Timestamptz, PrimitiveLiteral::Long(us)) => Some(*us),
        _ => None,
    }
}
