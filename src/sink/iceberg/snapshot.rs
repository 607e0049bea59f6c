//! Snapshots: manifest list and summary.

use std::collections::HashMap;

use iceberg::io::FileIO;
use iceberg::spec::{ManifestFile, ManifestList, ManifestListWriter, Operation, Snapshot, Summary, TableMetadata};
use uuid::Uuid;

pub(super) async fn manifest_list(
    file_io: &FileIO,
    metadata: &TableMetadata,
    snapshot: &Snapshot,
) -> iceberg::Result<ManifestList> {
    let bytes = file_io.new_input(snapshot.manifest_list())?.read().await?;
    ManifestList::parse_with_version(&bytes, metadata.format_version())
}

/// A snapshot about to be made on top of the current one.
pub(super) struct NextSnapshot {
    pub snapshot_id: i64,
    pub attempt: Uuid,
    pub operation: Operation,
    pub schema_id: i32,
    /// What was added and removed, and whatever else the summary says.
    pub properties: HashMap<String, String>,
}

impl NextSnapshot {
    /// Writes the manifest list.
    pub async fn write(
        self,
        file_io: &FileIO,
        metadata: &TableMetadata,
        manifests: Vec<ManifestFile>,
        written: &mut Vec<String>,
    ) -> iceberg::Result<Snapshot> {
        let NextSnapshot { snapshot_id, attempt, operation, schema_id, properties } = self;
        let parent = metadata.current_snapshot();
        let folder = format!("{}/metadata", metadata.location().trim_end_matches('/'));
        let list_path = format!("{folder}/snap-{snapshot_id}-0-{attempt}.avro");
        written.push(list_path.clone());
        let sequence_number = metadata.next_sequence_number();
        let writer = file_io.new_output(&list_path)?.writer().await?;
        let mut list = ManifestListWriter::v2(writer, snapshot_id, parent.map(|p| p.snapshot_id()), sequence_number);
        list.add_manifests(manifests.into_iter())?;
        list.close().await?;
        let additional_properties = summary(properties, parent.map(|p| &p.summary().additional_properties));
        // Snapshots of one table are ordered in time, also when clocks are not.
        let timestamp_ms = chrono::Utc::now().timestamp_millis().max(metadata.last_updated_ms());
        Ok(Snapshot::builder()
            .with_snapshot_id(snapshot_id)
            .with_parent_snapshot_id(parent.map(|p| p.snapshot_id()))
            .with_sequence_number(sequence_number)
            .with_timestamp_ms(timestamp_ms)
            .with_manifest_list(list_path)
            .with_summary(Summary { operation, additional_properties })
            .with_schema_id(schema_id)
            .build())
    }
}

/// The snapshot summary: `properties`, with what was added and removed among them, and the running totals that readers and
/// planners go by. A total that the parent does not know stays unknown.
fn summary(properties: HashMap<String, String>, parent: Option<&HashMap<String, String>>) -> HashMap<String, String> {
    const TOTALS: [(&str, &str, &str); 6] = [
        ("total-data-files", "added-data-files", "deleted-data-files"),
        ("total-records", "added-records", "deleted-records"),
        ("total-files-size", "added-files-size", "removed-files-size"),
        ("total-delete-files", "added-delete-files", "removed-delete-files"),
        ("total-position-deletes", "added-position-deletes", "removed-position-deletes"),
        ("total-equality-deletes", "added-equality-deletes", "removed-equality-deletes"),
    ];
    let mut summary = properties;
    for (total, added, removed) in TOTALS {
        let before = match parent {
            None => Some(0),
            Some(parent) => parent.get(total).and_then(|n| n.parse::<u64>().ok()),
        };
        if let Some(before) = before {
            let number = |key| summary.get(key).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
            let after = (before + number(added)).saturating_sub(number(removed));
            summary.insert(total.to_string(), after.to_string());
        }
    }
    summary
}

pub(super) fn new_snapshot_id(metadata: &TableMetadata) -> i64 {
    loop {
        let (high, low) = Uuid::new_v4().as_u64_pair();
        let id = i64::try_from((high ^ low) >> 1).unwrap_or(i64::MAX);
        if metadata.snapshot_by_id(id).is_none() {
            return id;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_run_on_and_unknown_ones_stay_unknown() {
        let map = |pairs: &[(&str, &str)]| -> HashMap<String, String> {
            pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
        };
        let added = map(&[("added-records", "5"), ("added-data-files", "1")]);
        let mut of_a_batch = added.clone();
        of_a_batch.insert("floe.offsets".into(), "{}".into());
        let first = summary(of_a_batch, None);
        assert_eq!((first["total-records"].as_str(), first["total-delete-files"].as_str()), ("5", "0"));
        let parent = map(&[("total-records", "7")]);
        let next = summary(added, Some(&parent));
        assert_eq!(next["total-records"], "12");
        let replaced = map(&[("added-records", "5"), ("deleted-records", "6")]);
        assert_eq!(summary(replaced, Some(&parent))["total-records"], "6");
        assert!(!next.contains_key("total-data-files"));
    }
}
