//! Metadata files that a table no longer needs.
//!
//! Every commit writes one; the table's log names the last `write.metadata.previous-versions-max` of them. Owns: deleting
//! those that have left the log, once it is certain that the commit has happened. Best effort: one that stays behind
//! costs space and nothing else.

use std::collections::HashSet;
use std::time::Duration;

use futures::StreamExt;
use iceberg::io::FileIO;
use iceberg::spec::TableMetadata;

pub const DELETE_AFTER_COMMIT: &str = "write.metadata.delete-after-commit.enabled";

/// A store that does not answer must not hold up the batch.
const PATIENCE: Duration = Duration::from_secs(5);

/// Deletes the metadata files that `now` has dropped since `base`, if the table's properties say so.
pub async fn remove_dropped(file_io: &FileIO, base: &TableMetadata, now: &TableMetadata) {
    let deleting = futures::stream::iter(dropped(base, now)).for_each_concurrent(8, |location| async move {
        if let Err(error) = file_io.delete(&location).await {
            tracing::debug!(location, %error, "could not delete old table metadata");
        }
    });
    if tokio::time::timeout(PATIENCE, deleting).await.is_err() {
        tracing::debug!(table = now.location(), "deleting old table metadata takes too long; some stay behind");
    }
}

/// In the log of `base` and no longer in that of `now`: neither the current metadata nor the one that it was made from.
fn dropped(base: &TableMetadata, now: &TableMetadata) -> Vec<String> {
    if now.properties().get(DELETE_AFTER_COMMIT).is_none_or(|enabled| !enabled.eq_ignore_ascii_case("true")) {
        return Vec::new();
    }
    let kept: HashSet<&str> = now.metadata_log().iter().map(|entry| entry.metadata_file.as_str()).collect();
    let log = base.metadata_log().iter().map(|entry| &entry.metadata_file);
    log.filter(|file| !kept.contains(file.as_str())).cloned().collect()
}
