//! Which snapshots a table no longer needs, and the commit that drops them.
//!
//! The rules are those of Iceberg's `expire_snapshots` with the table's `history.expire.*` properties and the retention of
//! its branches and tags. Floe's own snapshots expire by count as well where nothing names an age: a table that is committed
//! to every few seconds would otherwise carry tens of thousands in each metadata file. Invariants: what a branch or tag
//! points at stays for as long as that is to be kept, and so does the snapshot of every query's newest batch, from which dead letters may still be published.

use std::collections::{HashMap, HashSet};

use iceberg::spec::{MAIN_BRANCH, SnapshotRef, SnapshotReference, SnapshotRetention, TableMetadata};
use uuid::Uuid;

use super::reach::Reach;
use super::{Maintainer, Round, TableReport};
use crate::config::MaintenanceConfig;
use crate::failpoint;
use crate::retry::{Strategy, random};
use crate::sink::Error;
use crate::sink::iceberg::catalog::{CommitError, TableChange, TableName, iceberg_error};
use crate::sink::iceberg::commit::{delete_all, may_delete_files};
use crate::sink::iceberg::marker::{Marker, is_marker_tag, snapshot_of};

pub(super) const ATTEMPTS: u32 = 10;
pub(super) const BACKOFF: Strategy =
    Strategy::Exponential { initial: std::time::Duration::from_millis(20), max: std::time::Duration::from_secs(2) };

impl Maintainer {
    pub(super) async fn expire(&self, table: &TableName, round: &Round, report: &mut TableReport) -> Result<(), Error> {
        let failed = |e| iceberg_error("expire snapshots of", table, e);
        let mut conflict = String::new();
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                tokio::time::sleep(BACKOFF.delay(attempt - 1, random())).await;
            }
            let Some(loaded) = self.load(table).await? else { return Ok(()) };
            let before = loaded.metadata.clone();
            let expired = expired(&before, &round.policy, chrono::Utc::now().timestamp_millis())?;
            if expired.snapshots.is_empty() && expired.refs.is_empty() {
                return Ok(());
            }
            let Expired { snapshots: expired, refs } = expired;
            if round.dry_run {
                report.snapshots_expired = expired.len() as u64;
                let reach =
                    Reach::of_expired(&self.file_io, &before, &before, &expired, round).await.map_err(failed)?;
                report.files_expired = reach.files.len() as u64;
                return Ok(());
            }
            let change = TableChange::new(table, &loaded, |builder| {
                let builder = refs.iter().fold(builder, |builder, name| builder.remove_ref(name));
                let builder = expired
                    .iter()
                    .fold(builder, |builder, id| builder.remove_statistics(*id).remove_partition_statistics(*id));
                Ok(builder.remove_snapshots(&expired))
            })
            .map_err(failed)?;
            match self.catalog.commit(&[change]).await {
                Ok(()) => {}
                Err(CommitError::Conflict(message)) => {
                    conflict = message;
                    continue;
                }
                // The table, loaded anew, says whether it has happened.
                Err(CommitError::Failed(Error::Indeterminate { message })) => {
                    let now = self.load(table).await.map_err(|e| Error::indeterminate(format!("{message}; {e}")))?;
                    let gone = now.is_some_and(|now| {
                        expired.iter().all(|id| now.metadata.snapshot_by_id(*id).is_none())
                            && refs.iter().all(|name| now.metadata.snapshot_for_ref(name).is_none())
                    });
                    if !gone {
                        return Err(Error::Indeterminate { message });
                    }
                }
                Err(CommitError::Failed(error)) => return Err(error),
            }
            report.snapshots_expired = expired.len() as u64;
            fail_at("maintenance.expired")?;

            let Some(now) = self.load(table).await? else { return Ok(()) };
            if now.metadata.uuid() != before.uuid() {
                return Ok(());
            }
            let reach =
                Reach::of_expired(&self.file_io, &before, &now.metadata, &expired, round).await.map_err(failed)?;
            let mut files = reach.files;
            let rest = files.split_off(files.len() / 2);
            report.files_expired += delete_all(&self.file_io, files).await;
            fail_at("maintenance.deleting")?;
            report.files_expired += delete_all(&self.file_io, rest).await;
            tracing::info!(
                %table,
                snapshots = report.snapshots_expired,
                files = report.files_expired,
                refs = refs.join(", "),
                "snapshots expired"
            );
            return Ok(());
        }
        Err(Error::transient(format!("other writers were faster in {ATTEMPTS} attempts: {conflict}")))
    }
}

pub(super) fn fail_at(name: &str) -> Result<(), Error> {
    if failpoint::hit(name) { Err(Error::transient(format!("failpoint {name}"))) } else { Ok(()) }
}

/// What the table no longer needs.
#[derive(Debug, Default, PartialEq)]
struct Expired {
    snapshots: Vec<i64>,
    /// Branches and tags.
    refs: Vec<String>,
}

fn expired(metadata: &TableMetadata, policy: &MaintenanceConfig, now_ms: i64) -> Result<Expired, Error> {
    if metadata.snapshots().len() < 2 || !may_delete_files(metadata) {
        return Ok(Expired::default());
    }
    let (outdated, refs): (HashMap<_, _>, HashMap<_, _>) =
        refs(metadata)?.into_iter().partition(|(name, reference)| is_outdated(metadata, name, reference, now_ms));
    let kept = kept(metadata, &refs, policy, now_ms);
    let mut snapshots: Vec<i64> =
        metadata.snapshots().map(|s| s.snapshot_id()).filter(|id| !kept.contains(id)).collect();
    snapshots.sort_unstable();
    let mut refs: Vec<String> = outdated.into_keys().collect();
    refs.sort_unstable();
    Ok(Expired { snapshots, refs })
}

/// Whether a branch or tag is older than its retention allows. Never main, nor a tag that carries a marker.
fn is_outdated(metadata: &TableMetadata, name: &str, reference: &SnapshotReference, now_ms: i64) -> bool {
    if name == MAIN_BRANCH || is_marker_tag(name) {
        return false;
    }
    let of_its_own = match &reference.retention {
        SnapshotRetention::Branch { max_ref_age_ms, .. } | SnapshotRetention::Tag { max_ref_age_ms } => *max_ref_age_ms,
    };
    let age = of_its_own.or_else(|| number(metadata, "history.expire.max-ref-age-ms"));
    let made = metadata.snapshot_by_id(reference.snapshot_id).map(|snapshot| snapshot.timestamp_ms());
    age.zip(made).is_some_and(|(age, made)| now_ms.saturating_sub(made) > age)
}

fn number(metadata: &TableMetadata, property: &str) -> Option<i64> {
    metadata.properties().get(property).and_then(|n| n.parse().ok())
}

/// The crate tells a reference by its name only; its JSON tells all of them.
fn refs(metadata: &TableMetadata) -> Result<HashMap<String, SnapshotReference>, Error> {
    let unreadable = |e: serde_json::Error| Error::fatal(format!("the branches and tags cannot be told: {e}"));
    let mut json = serde_json::to_value(metadata).map_err(unreadable)?;
    match json.get_mut("refs").map(serde_json::Value::take) {
        Some(refs) if refs.is_object() => serde_json::from_value(refs).map_err(unreadable),
        _ => Ok(HashMap::new()),
    }
}

fn kept(
    metadata: &TableMetadata,
    refs: &HashMap<String, SnapshotReference>,
    policy: &MaintenanceConfig,
    now_ms: i64,
) -> HashSet<i64> {
    let table_age = number(metadata, "history.expire.max-snapshot-age-ms");
    let table_min = number(metadata, "history.expire.min-snapshots-to-keep");
    let default_age = i64::try_from(policy.max_snapshot_age.as_millis()).unwrap_or(i64::MAX);
    let cutoff = |age: Option<i64>| now_ms.saturating_sub(age.or(table_age).unwrap_or(default_age));

    let mut kept: HashSet<i64> = metadata.current_snapshot_id().into_iter().collect();
    let mut referenced = kept.clone();
    for reference in refs.values() {
        kept.insert(reference.snapshot_id);
        referenced.insert(reference.snapshot_id);
        let SnapshotRetention::Branch { min_snapshots_to_keep, max_snapshot_age_ms, .. } = &reference.retention else {
            continue;
        };
        let min = min_snapshots_to_keep.map(i64::from).or(table_min).unwrap_or(1).max(1) as usize;
        let cutoff = cutoff(*max_snapshot_age_ms);
        let age_is_named = max_snapshot_age_ms.or(table_age).is_some();
        let mut young = true;
        for (i, snapshot) in ancestors(metadata, reference.snapshot_id).enumerate() {
            referenced.insert(snapshot.snapshot_id());
            // As Iceberg does: what is older than a snapshot that is too old, is too old.
            young = young && snapshot.timestamp_ms() >= cutoff;
            let in_count = age_is_named || i < policy.max_snapshots || !is_floes(snapshot);
            if i < min || young && in_count {
                kept.insert(snapshot.snapshot_id());
            }
        }
    }
    // Such as what others have staged and not published yet.
    let unreferenced = metadata.snapshots().filter(|s| !referenced.contains(&s.snapshot_id()));
    kept.extend(unreferenced.filter(|s| s.timestamp_ms() >= cutoff(None)).map(|s| s.snapshot_id()));
    for (property, json) in metadata.properties() {
        let is_marker = property.strip_prefix("floe.").is_some_and(|id| Uuid::parse_str(id).is_ok());
        if let (true, Ok(marker)) = (is_marker, serde_json::from_str::<Marker>(json)) {
            kept.extend(snapshot_of(metadata, property, marker.batch).map(|s| s.snapshot_id()));
        }
    }
    kept
}

/// A snapshot and those that it was made from, the newest first.
fn ancestors(metadata: &TableMetadata, id: i64) -> impl Iterator<Item = &SnapshotRef> {
    std::iter::successors(metadata.snapshot_by_id(id), |snapshot| {
        metadata.snapshot_by_id(snapshot.parent_snapshot_id()?)
    })
}

fn is_floes(snapshot: &SnapshotRef) -> bool {
    snapshot.summary().additional_properties.keys().any(|key| key.starts_with("floe."))
}
