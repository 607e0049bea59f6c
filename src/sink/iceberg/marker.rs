//! Which batch a table has, of which query: what makes a commit happen once.
//!
//! Owns: where it is written and how it is found. Does not own: when it is set ([`super::commit`]).

use std::collections::BTreeMap;

use iceberg::spec::{SnapshotRef, TableMetadata};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::catalog::TableName;
use crate::batch::BatchId;
use crate::sink::Error;

/// Which batch of a query a table has: the JSON value of the table property `floe.<query-id>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marker {
    pub pipeline: String,
    pub batch: BatchId,
    /// `sha256:<hex>` of the plan as logged; with `+<fingerprint>` where the batch was executed with another configuration
    /// than it was planned with.
    pub plan: String,
}

/// What holds the marker of a table, and whatever else a batch sets: properties, because they outlive snapshot expiry,
/// compaction by others and rollbacks. Where the catalog takes none, a tag of the marker's name with a dash on the last
/// snapshot, whose summary has what the properties would have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    Property,
    Tag,
}

impl Carrier {
    pub(super) fn property<'a>(self, metadata: &'a TableMetadata, query_id: Uuid, name: &str) -> Option<&'a str> {
        let found = match self {
            Carrier::Property => metadata.properties().get(name),
            Carrier::Tag => {
                let tagged = metadata.snapshot_for_ref(&marker_tag(query_id));
                tagged.and_then(|snapshot| snapshot.summary().additional_properties.get(name))
            }
        };
        found.map(String::as_str)
    }
}

pub fn marker_property(query_id: Uuid) -> String {
    format!("floe.{query_id}")
}

pub fn marker_tag(query_id: Uuid) -> String {
    format!("floe-{query_id}")
}

/// Whether [`marker_tag`] makes this name, of any query.
pub(super) fn is_marker_tag(name: &str) -> bool {
    name.strip_prefix("floe-").is_some_and(|id| Uuid::parse_str(id).is_ok())
}

/// The last batch of a query that the table has, and what says so. A marker that cannot be read must not pass for a table
/// without one.
pub(super) fn carried(
    table: &TableName,
    metadata: &TableMetadata,
    query_id: Uuid,
) -> Result<Option<(Carrier, Marker)>, Error> {
    let mut newest: Option<(Carrier, Marker)> = None;
    for carrier in [Carrier::Property, Carrier::Tag] {
        let property = marker_property(query_id);
        let Some(json) = carrier.property(metadata, query_id, &property) else { continue };
        let marker: Marker = serde_json::from_str(json).map_err(|e| {
            Error::fatal(format!("table {table}: {property} does not say which batch it has ({e}): {json}"))
        })?;
        if newest.as_ref().is_none_or(|(_, newest)| newest.batch < marker.batch) {
            newest = Some((carrier, marker));
        }
    }
    Ok(newest)
}

/// The snapshot that a batch has added, of the query whose marker is the property.
pub(super) fn snapshot_of<'a>(metadata: &'a TableMetadata, property: &str, batch: BatchId) -> Option<&'a SnapshotRef> {
    let is_it = |snapshot: &&SnapshotRef| {
        let json = snapshot.summary().additional_properties.get(property);
        json.and_then(|json| serde_json::from_str::<Marker>(json).ok()).is_some_and(|marker| marker.batch == batch)
    };
    // Nearly always it is the newest one.
    metadata.current_snapshot().filter(is_it).or_else(|| metadata.snapshots().find(is_it))
}

/// Every query's marker, by property or by tag.
pub(super) fn markers(metadata: &TableMetadata) -> Vec<(Uuid, Marker)> {
    let marker = |(key, json): (&String, &String)| {
        let id = Uuid::parse_str(key.strip_prefix("floe.")?).ok()?;
        Some((id, serde_json::from_str(json).ok()?))
    };
    let mut markers: BTreeMap<Uuid, Marker> = metadata.properties().iter().filter_map(marker).collect();
    for snapshot in metadata.snapshots() {
        for (id, marker) in snapshot.summary().additional_properties.iter().filter_map(marker) {
            let tagged = metadata.snapshot_for_ref(&marker_tag(id));
            let newer = markers.get(&id).is_none_or(|known| known.batch < marker.batch);
            if newer && tagged.is_some_and(|tagged| tagged.snapshot_id() == snapshot.snapshot_id()) {
                markers.insert(id, marker);
            }
        }
    }
    markers.into_iter().collect()
}
