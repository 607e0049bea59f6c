//! Which files only expired snapshots needed.
//!
//! A data file that an expired snapshot has is in one of its manifests, live. If a snapshot that stays has this manifest
//! too, it has the file as well. So only manifests that no kept snapshot has are read, and of the kept ones those that were
//! written with the same sequence numbers, into which entries of the former may have been merged.

use std::collections::{HashMap, HashSet};

use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use iceberg::io::FileIO;
use iceberg::spec::{Manifest, ManifestFile, ManifestList, Snapshot, TableMetadata};

use super::Round;
use crate::sink::iceberg::snapshot::manifest_list;

const CONCURRENT_READS: usize = 4;

pub(super) struct Reach {
    /// Data files first: a manifest list that is left says where the rest is.
    pub files: Vec<String>,
}

/// A file of an unneeded manifest.
struct Candidate {
    sequence_number: i64,
    last_used_ms: i64,
}

impl Reach {
    /// `before` still names the expired snapshots, `now` is the table as it is. An error means that nothing may be deleted.
    pub async fn of_expired(
        file_io: &FileIO,
        before: &TableMetadata,
        now: &TableMetadata,
        expired: &[i64],
        round: &Round,
    ) -> iceberg::Result<Reach> {
        let expired: HashSet<i64> = expired.iter().copied().collect();
        let is_kept = |snapshot: &&Snapshot| !expired.contains(&snapshot.snapshot_id());
        let kept = manifests_of(file_io, now, now.snapshots().map(|s| s.as_ref()).filter(is_kept)).await?;

        let mut files: Vec<String> = Vec::new();
        let mut lists = Vec::new();
        // With when it was last part of the table, as far as that is known.
        let mut gone: HashMap<String, (ManifestFile, i64)> = HashMap::new();
        for snapshot in expired.iter().filter_map(|id| before.snapshot_by_id(*id)) {
            let list = match manifest_list(file_io, before, snapshot).await {
                Ok(list) => list,
                Err(error) => {
                    let list = snapshot.manifest_list();
                    tracing::debug!(list, %error, "files of an expired snapshot stay: its manifest list cannot be read");
                    continue;
                }
            };
            lists.push(snapshot.manifest_list().to_string());
            for manifest in list.consume_entries().into_iter().filter(|m| !kept.contains_key(&m.manifest_path)) {
                let used_ms = snapshot.timestamp_ms();
                let known = gone.entry(manifest.manifest_path.clone()).or_insert((manifest, used_ms));
                known.1 = known.1.max(used_ms);
            }
        }
        let kept_lists: HashSet<&str> =
            now.snapshots().filter(|s| is_kept(&s.as_ref())).map(|s| s.manifest_list()).collect();
        lists.retain(|list| !kept_lists.contains(list.as_str()));

        let mut candidates: HashMap<String, Candidate> = HashMap::new();
        let mut reading = read_all(file_io, gone.values().map(|(manifest, _)| manifest.clone()).collect());
        while let Some((manifest, loaded)) = reading.next().await {
            let used_ms = gone.get(&manifest.manifest_path).map_or(i64::MAX, |(_, used_ms)| *used_ms);
            let loaded = match loaded {
                Ok(loaded) => loaded,
                Err(error) => {
                    let manifest = &manifest.manifest_path;
                    tracing::debug!(manifest, %error, "files of an expired manifest stay: it cannot be read");
                    continue;
                }
            };
            for entry in loaded.entries().iter().filter(|entry| entry.is_alive()) {
                let sequence_number = entry.sequence_number().unwrap_or(manifest.sequence_number);
                let candidate = candidates
                    .entry(entry.file_path().to_string())
                    .or_insert(Candidate { sequence_number, last_used_ms: used_ms });
                candidate.last_used_ms = candidate.last_used_ms.max(used_ms);
            }
        }
        drop(reading);
        strike_out(file_io, &mut candidates, kept.values()).await?;

        let grace_ms = i64::try_from(round.readers_grace.as_millis()).unwrap_or(i64::MAX);
        let cutoff = chrono::Utc::now().timestamp_millis().saturating_sub(grace_ms);
        files.extend(candidates.into_iter().filter(|(_, c)| c.last_used_ms <= cutoff).map(|(file, _)| file));
        files.extend(statistics(before).difference(&statistics(now)).cloned());
        files.extend(gone.into_keys());
        files.extend(lists);
        Ok(Reach { files })
    }
}

/// Takes out the files that a kept manifest has.
async fn strike_out(
    file_io: &FileIO,
    candidates: &mut HashMap<String, Candidate>,
    kept: impl Iterator<Item = &ManifestFile>,
) -> iceberg::Result<()> {
    let numbers = || candidates.values().map(|c| c.sequence_number);
    let (Some(first), Some(last)) = (numbers().min(), numbers().max()) else { return Ok(()) };
    let may_have = |m: &&ManifestFile| m.min_sequence_number <= last && m.sequence_number >= first;
    let mut reading = read_all(file_io, kept.filter(may_have).cloned().collect());
    while let Some((_, manifest)) = reading.next().await {
        for entry in manifest?.entries().iter().filter(|entry| entry.is_alive()) {
            candidates.remove(entry.file_path());
        }
        if candidates.is_empty() {
            break;
        }
    }
    Ok(())
}

/// The manifests, some at a time, in any order.
pub(super) fn read_all(
    file_io: &FileIO,
    manifests: Vec<ManifestFile>,
) -> BoxStream<'static, (ManifestFile, iceberg::Result<Manifest>)> {
    let read = |manifest: ManifestFile| {
        let file_io = file_io.clone();
        async move {
            let loaded = manifest.load_manifest(&file_io).await;
            (manifest, loaded)
        }
    };
    let reading: Vec<_> = manifests.into_iter().map(read).collect();
    futures::stream::iter(reading).buffer_unordered(CONCURRENT_READS).boxed()
}

/// Every manifest of the snapshots, once. Fails when a list cannot be read: what is in it would count as unneeded.
pub(super) async fn manifests_of<'a>(
    file_io: &FileIO,
    metadata: &TableMetadata,
    snapshots: impl Iterator<Item = &'a Snapshot>,
) -> iceberg::Result<HashMap<String, ManifestFile>> {
    let version = metadata.format_version();
    let read = |snapshot: &Snapshot| {
        let (file_io, location) = (file_io.clone(), snapshot.manifest_list().to_string());
        async move {
            let bytes = file_io.new_input(location)?.read().await?;
            ManifestList::parse_with_version(&bytes, version)
        }
    };
    let reading: Vec<_> = snapshots.map(read).collect();
    let mut lists = futures::stream::iter(reading).buffer_unordered(CONCURRENT_READS).boxed();
    let mut manifests = HashMap::new();
    while let Some(list) = lists.try_next().await? {
        manifests.extend(list.consume_entries().into_iter().map(|m| (m.manifest_path.clone(), m)));
    }
    Ok(manifests)
}

pub(super) fn statistics(metadata: &TableMetadata) -> HashSet<String> {
    let of_tables = metadata.statistics_iter().map(|s| &s.statistics_path);
    of_tables.chain(metadata.partition_statistics_iter().map(|s| &s.statistics_path)).cloned().collect()
}
