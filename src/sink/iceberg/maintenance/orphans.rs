//! Files in a table's folders that nothing references: what killed processes and lost commits have left behind.
//!
//! The folders are listed first and the table is loaded after that, so that a file which is committed in between is found
//! to be referenced. Files are told by their names alone, which are unique: the same file may be written `s3://` here and
//! `s3a://` there. Invariants: nothing younger than the grace time is deleted; nothing is while any part of the table's
//! metadata cannot be read, or while the folder holds metadata of another table.

use std::collections::{HashMap, HashSet};

use futures::{StreamExt, TryStreamExt};
use iceberg::spec::TableMetadata;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

use super::expire::fail_at;
use super::reach::{manifests_of, read_all, statistics};
use super::{Maintainer, Round, TableReport};
use crate::sink::Error;
use crate::sink::iceberg::catalog::{LoadedTable, TableName, iceberg_error};
use crate::sink::iceberg::commit::may_delete_files;

const METADATA_SUFFIXES: [&str; 5] = [".avro", ".metadata.json", ".metadata.json.gz", ".puffin", ".stats"];
const DATA_SUFFIXES: [&str; 4] = [".parquet", ".orc", ".avro", ".puffin"];

#[derive(Default)]
struct Listed {
    /// Old enough, by name.
    candidates: HashMap<String, Vec<(Path, u64)>>,
    /// Table metadata of any age.
    metadata: HashMap<String, String>,
}

impl Maintainer {
    pub(super) async fn remove_orphans(
        &self,
        table: &TableName,
        round: &Round,
        report: &mut TableReport,
    ) -> Result<(), Error> {
        let failed = |e| iceberg_error("find orphans of", table, e);
        let Some(before) = self.load(table).await? else { return Ok(()) };
        if !may_delete_files(&before.metadata) {
            return Ok(());
        }
        let mut listed = Listed::default();
        for (folder, suffixes) in folders(&before.metadata) {
            self.list(table, &folder, &suffixes, round, &mut listed).await?;
        }
        if listed.candidates.is_empty() || round.over() {
            return Ok(());
        }
        // Not before now.
        let Some(now) = self.load(table).await? else { return Ok(()) };
        if now.metadata.uuid() != before.metadata.uuid() {
            return Ok(());
        }
        self.strike_out(&now, &mut listed).await.map_err(failed)?;
        if let Some(other) = self.metadata_of_another(&now, &listed).await.map_err(failed)? {
            return Err(Error::transient(format!(
                "the folder of table {table} also holds metadata of another table, {other}: no orphan is removed from it. \
                 Move one of the two tables, or delete what a table that was dropped has left"
            )));
        }
        let (store, _) = self.storage.locate(now.metadata.location()).map_err(failed)?;
        for (path, bytes) in listed.candidates.into_values().flatten() {
            if round.stopped() {
                break;
            }
            if !round.dry_run {
                match store.delete(&path).await {
                    Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                    Err(e) => return Err(Error::transient(format!("cannot delete orphan {path}: {e}"))),
                }
                fail_at("maintenance.orphan")?;
            }
            report.orphans_removed += 1;
            report.bytes_of_orphans += bytes;
        }
        if report.orphans_removed > 0 && !round.dry_run {
            tracing::info!(%table, files = report.orphans_removed, bytes = report.bytes_of_orphans, "orphans removed");
        }
        Ok(())
    }

    async fn list(
        &self,
        table: &TableName,
        folder: &str,
        suffixes: &[&str],
        round: &Round,
        listed: &mut Listed,
    ) -> Result<(), Error> {
        let (store, prefix) = self.storage.locate(folder).map_err(|e| iceberg_error("list", table, e))?;
        let grace = chrono::Duration::from_std(round.policy.orphan_grace).unwrap_or(chrono::Duration::MAX);
        let cutoff = chrono::Utc::now() - grace;
        let mut listing = store.list(Some(&prefix));
        let failed = |e| Error::transient(format!("table {table}: cannot list {folder}: {e}"));
        while let Some(meta) = listing.try_next().await.map_err(failed)? {
            if round.over() {
                break;
            }
            let name = meta.location.filename().unwrap_or_default().to_string();
            // Hidden files are others' business.
            if name.starts_with(['.', '_']) || !suffixes.iter().any(|suffix| name.ends_with(suffix)) {
                continue;
            }
            if name.ends_with(".metadata.json") {
                listed.metadata.insert(name.clone(), format!("{folder}/{name}"));
            }
            if meta.last_modified < cutoff {
                listed.candidates.entry(name).or_default().push((meta.location, meta.size));
            }
        }
        Ok(())
    }

    /// Takes out whatever the table references.
    async fn strike_out(&self, table: &LoadedTable, listed: &mut Listed) -> iceberg::Result<()> {
        let metadata = &table.metadata;
        let mut referenced: HashSet<String> = statistics(metadata);
        referenced.insert(table.metadata_location.clone());
        referenced.extend(metadata.metadata_log().iter().map(|entry| entry.metadata_file.clone()));
        referenced.extend(metadata.snapshots().map(|snapshot| snapshot.manifest_list().to_string()));
        let manifests = manifests_of(&self.file_io, metadata, metadata.snapshots().map(|s| s.as_ref())).await?;
        referenced.extend(manifests.keys().cloned());
        for location in &referenced {
            listed.candidates.remove(name_of(location));
            listed.metadata.remove(name_of(location));
        }
        let data = |name: &String| !METADATA_SUFFIXES.iter().any(|s| *s != ".avro" && name.ends_with(s));
        let mut reading = read_all(&self.file_io, manifests.into_values().collect());
        while listed.candidates.keys().any(data) {
            let Some((_, manifest)) = reading.next().await else { break };
            for entry in manifest?.entries().iter().filter(|entry| entry.is_alive()) {
                listed.candidates.remove(name_of(entry.file_path()));
            }
        }
        Ok(())
    }

    /// Tables that share a folder, as after a rename and a new table of the old name, must not take each other's files for
    /// orphans.
    async fn metadata_of_another(&self, table: &LoadedTable, listed: &Listed) -> iceberg::Result<Option<String>> {
        for location in listed.metadata.values() {
            // Whatever it is, it may just be going away.
            let Ok(metadata) = TableMetadata::read_from(&self.file_io, location).await else { continue };
            if metadata.uuid() != table.metadata.uuid() {
                return Ok(Some(location.clone()));
            }
        }
        Ok(None)
    }
}

fn name_of(location: &str) -> &str {
    location.rsplit('/').next().unwrap_or(location)
}

/// Where the table's files are, and how they end. A folder elsewhere (`write.data.path`) may belong to others as well.
fn folders(metadata: &TableMetadata) -> Vec<(String, Vec<&'static str>)> {
    let location = metadata.location().trim_end_matches('/');
    let mut folders = vec![(format!("{location}/metadata"), METADATA_SUFFIXES.to_vec())];
    let data = metadata.properties().get("write.data.path").map(|path| path.trim_end_matches('/'));
    if data.is_none_or(|path| path == format!("{location}/data")) {
        folders.push((format!("{location}/data"), DATA_SUFFIXES.to_vec()));
    }
    folders
}
