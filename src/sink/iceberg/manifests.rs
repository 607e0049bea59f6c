//! Which manifests a commit merges, and how: what keeps planning a scan, and the commit itself, as fast as on the first day.
//!
//! Manifests are merged by tiers: `n` small ones into one with their files, `n` of those into the next larger one, up to
//! the target size. So every entry is rewritten a few times at most, and there are about `n` manifests a tier. Owns: the
//! choice and the merged file. Invariants: an entry keeps its snapshot and sequence numbers; manifests of deletes, of
//! other partition specs and encrypted ones are left alone, and so is everything when a manifest cannot be read.

use std::collections::{HashMap, HashSet};

use futures::future::try_join_all;
use iceberg::io::FileIO;
use iceberg::spec::{
    Manifest, ManifestContentType, ManifestFile, ManifestWriterBuilder, SchemaRef, StructType, TableMetadata,
};

pub const MIN_COUNT_TO_MERGE: &str = "commit.manifest.min-count-to-merge";
const MERGE_ENABLED: &str = "commit.manifest-merge.enabled";
const TARGET_SIZE: &str = "commit.manifest.target-size-bytes";

/// What the table's properties say, with Iceberg's own defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    pub enabled: bool,
    pub min_count: usize,
    pub target_bytes: i64,
}

impl Policy {
    pub fn of(properties: &HashMap<String, String>) -> Policy {
        let number = |name: &str, default: i64| {
            properties.get(name).and_then(|n| n.parse::<i64>().ok()).filter(|n| *n > 0).unwrap_or(default)
        };
        Policy {
            enabled: properties.get(MERGE_ENABLED).is_none_or(|enabled| !enabled.eq_ignore_ascii_case("false")),
            min_count: usize::try_from(number(MIN_COUNT_TO_MERGE, 100)).unwrap_or(usize::MAX).max(2),
            target_bytes: number(TARGET_SIZE, 8 << 20),
        }
    }
}

/// Positions of the manifests to merge: all of the lowest tier that is full, as many as fit into one file.
fn choose(manifests: &[ManifestFile], spec_id: i32, policy: Policy) -> Vec<usize> {
    if !policy.enabled {
        return Vec::new();
    }
    let mut tiers: HashMap<u32, Vec<usize>> = HashMap::new();
    for (i, manifest) in manifests.iter().enumerate() {
        let mergeable = manifest.content == ManifestContentType::Data
            && manifest.partition_spec_id == spec_id
            && manifest.key_metadata.is_none()
            // Two of them always fit into one file.
            && manifest.manifest_length <= policy.target_bytes / 2;
        if let (true, Some(added), Some(existing)) =
            (mergeable, manifest.added_files_count, manifest.existing_files_count)
        {
            let files = (u64::from(added) + u64::from(existing)).max(1);
            tiers.entry(files.ilog(policy.min_count as u64)).or_default().push(i);
        }
    }
    let full = tiers.into_iter().filter(|(_, members)| members.len() >= policy.min_count).min_by_key(|(tier, _)| *tier);
    let mut bytes = 0;
    let members = full.map(|(_, members)| members).unwrap_or_default();
    let chosen: Vec<usize> = members
        .into_iter()
        .take_while(|i| {
            bytes += manifests[*i].manifest_length;
            bytes <= policy.target_bytes
        })
        .collect();
    if chosen.len() > 1 { chosen } else { Vec::new() }
}

/// The manifests of a snapshot for its successor.
pub struct Merged {
    pub manifests: Vec<ManifestFile>,
    pub created: usize,
    pub replaced: usize,
    pub entries: usize,
}

/// What [`Merge::rewrite`] has written.
pub struct Rewritten {
    pub manifests: Vec<ManifestFile>,
    pub entries: usize,
    /// How many of the entries are deleted ones.
    pub deleted: usize,
}

/// The commit that manifests are merged for.
pub struct Merge<'a> {
    pub file_io: &'a FileIO,
    pub metadata: &'a TableMetadata,
    /// The partition spec whose manifests are merged.
    pub spec_id: i32,
    pub schema: &'a SchemaRef,
    pub snapshot_id: i64,
}

impl Merge<'_> {
    /// Merges where it is time to. `path` names the nth file of the commit; every file that was begun is in `written`.
    pub async fn run(
        &self,
        manifests: Vec<ManifestFile>,
        path: impl Fn(usize) -> String,
        written: &mut Vec<String>,
    ) -> Merged {
        let chosen = choose(&manifests, self.spec_id, Policy::of(self.metadata.properties()));
        let members: Vec<&ManifestFile> = chosen.iter().map(|i| &manifests[*i]).collect();
        let untouched = |manifests| Merged { manifests, created: 0, replaced: 0, entries: 0 };
        if members.is_empty() {
            return untouched(manifests);
        }
        let before = written.len();
        match self.rewrite(&members, &HashSet::new(), path, written).await {
            Ok(Rewritten { manifests: mut merged, entries, .. }) => {
                let (created, replaced) = (merged.len(), chosen.len());
                let mut chosen = chosen.into_iter().peekable();
                for (i, manifest) in manifests.into_iter().enumerate() {
                    if chosen.next_if_eq(&i).is_none() {
                        merged.push(manifest);
                    }
                }
                Merged { manifests: merged, created, replaced, entries }
            }
            Err(error) => {
                let table = self.metadata.location();
                tracing::warn!(table, %error, "manifests are not merged; committing without that");
                for location in written.drain(before..) {
                    if let Err(error) = self.file_io.delete(&location).await {
                        tracing::debug!(location, %error, "could not delete an unused manifest");
                    }
                }
                untouched(manifests)
            }
        }
    }

    /// One manifest of many. Entries of the files in `removed` are kept as deleted ones, which is what tells readers of
    /// changes about them.
    pub async fn rewrite(
        &self,
        members: &[&ManifestFile],
        removed: &HashSet<String>,
        path: impl Fn(usize) -> String,
        written: &mut Vec<String>,
    ) -> iceberg::Result<Rewritten> {
        let loaded = try_join_all(members.iter().map(|manifest| manifest.load_manifest(self.file_io))).await?;
        // A partition column that was widened since has older values of another type: these stay among themselves.
        let mut groups: Vec<(StructType, Vec<&Manifest>)> = Vec::new();
        for manifest in &loaded {
            let of = manifest.metadata();
            let kind = of.partition_spec().partition_type(of.schema())?;
            match groups.iter_mut().find(|(other, _)| *other == kind) {
                Some((_, group)) => group.push(manifest),
                None => groups.push((kind, vec![manifest])),
            }
        }
        let mut merged = Vec::with_capacity(groups.len());
        let (mut entries, mut deleted) = (0, 0);
        for (kind, group) in groups {
            let Some(first) = group.first() else { continue };
            let spec = first.metadata().partition_spec().clone();
            let current = spec.partition_type(self.schema).is_ok_and(|current| current == kind);
            let schema = if current { self.schema.clone() } else { first.metadata().schema().clone() };
            let location = path(written.len());
            written.push(location.clone());
            let output = self.file_io.new_output(location)?;
            let mut writer = ManifestWriterBuilder::new(output, Some(self.snapshot_id), schema, spec).build_v2_data();
            let mut files = 0;
            for entry in group.iter().flat_map(|manifest| manifest.entries()).filter(|entry| entry.is_alive()) {
                let unknown = || {
                    let message = format!("{} has no snapshot or sequence number", entry.file_path());
                    iceberg::Error::new(iceberg::ErrorKind::DataInvalid, message)
                };
                let (file, sequence_number) = (entry.data_file().clone(), entry.sequence_number().ok_or_else(unknown)?);
                if removed.contains(entry.file_path()) {
                    writer.add_delete_file(file, sequence_number, entry.file_sequence_number)?;
                    deleted += 1;
                } else {
                    let snapshot_id = entry.snapshot_id().ok_or_else(unknown)?;
                    writer.add_existing_file(file, snapshot_id, sequence_number, entry.file_sequence_number)?;
                }
                files += 1;
            }
            if files > 0 {
                merged.push(writer.write_manifest_file().await?);
            } else {
                written.pop();
            }
            entries += files;
        }
        Ok(Rewritten { manifests: merged, entries, deleted })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(files: u32, bytes: i64) -> ManifestFile {
        ManifestFile {
            manifest_path: String::new(),
            manifest_length: bytes,
            partition_spec_id: 0,
            content: ManifestContentType::Data,
            sequence_number: 1,
            min_sequence_number: 1,
            added_snapshot_id: 1,
            added_files_count: Some(files),
            existing_files_count: Some(0),
            deleted_files_count: Some(0),
            added_rows_count: Some(1),
            existing_rows_count: Some(0),
            deleted_rows_count: Some(0),
            partitions: None,
            key_metadata: None,
            first_row_id: None,
        }
    }

    const POLICY: Policy = Policy { enabled: true, min_count: 3, target_bytes: 100 };

    #[test]
    fn a_full_tier_is_merged_the_lowest_first() {
        let small = manifest(1, 10);
        let large = manifest(4, 30);
        assert!(choose(&[small.clone(), small.clone(), large.clone(), large.clone()], 0, POLICY).is_empty());
        let both = [large.clone(), small.clone(), large.clone(), small.clone(), large.clone(), small.clone()];
        assert_eq!(choose(&both, 0, POLICY), [1, 3, 5]);
        assert_eq!(choose(&[large.clone(), large.clone(), small, large], 0, POLICY), [0, 1, 3]);
    }

    #[test]
    fn what_must_not_be_merged_is_left_alone() {
        let small = manifest(1, 10);
        let three = |odd: ManifestFile| choose(&[small.clone(), small.clone(), odd], 0, POLICY);
        assert_eq!(three(small.clone()), [0, 1, 2]);
        assert!(three(ManifestFile { content: ManifestContentType::Deletes, ..small.clone() }).is_empty());
        assert!(three(ManifestFile { partition_spec_id: 1, ..small.clone() }).is_empty());
        assert!(three(ManifestFile { key_metadata: Some(vec![1]), ..small.clone() }).is_empty());
        assert!(three(ManifestFile { added_files_count: None, ..small.clone() }).is_empty());
        assert!(three(manifest(1, 100)).is_empty());
        assert!(choose(&vec![small.clone(); 3], 0, Policy { enabled: false, ..POLICY }).is_empty());
        // As many as fit into one file; one alone would not get better.
        assert_eq!(choose(&vec![manifest(1, 40); 3], 0, POLICY), [0, 1]);
        assert!(choose(&vec![manifest(1, 60); 3], 0, POLICY).is_empty());
    }

    #[test]
    fn the_policy_is_the_tables() {
        let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        assert_eq!(Policy::of(&map(&[])), Policy { enabled: true, min_count: 100, target_bytes: 8 << 20 });
        let given = map(&[(MERGE_ENABLED, "False"), (MIN_COUNT_TO_MERGE, "1"), (TARGET_SIZE, "-1")]);
        assert_eq!(Policy::of(&given), Policy { enabled: false, min_count: 2, target_bytes: 8 << 20 });
    }
}
