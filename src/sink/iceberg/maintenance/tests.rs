use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::time::Duration;

use uuid::Uuid;

use super::*;
use crate::error::Kind;
use crate::sink::iceberg::catalog::{CommitError, TableChange};
use crate::sink::iceberg::snapshot::manifest_list;
use crate::sink::iceberg::tests::{Fixture, batch_commit, events, metadata, offsets, spec, write};
use crate::sink::iceberg::{IcebergSink, TableSpec};

const HOUR_US: i64 = 3_600_000_000;

pub(super) fn policy() -> MaintenanceConfig {
    MaintenanceConfig {
        enabled: true,
        interval: Duration::from_secs(600),
        time_budget: Duration::from_secs(60),
        max_snapshot_age: Duration::from_secs(5 * 86_400),
        max_snapshots: 3,
        compact_min_files: 1_000,
        compact_after: Duration::from_secs(3_600),
        orphan_grace: Duration::from_secs(3 * 86_400),
    }
}

fn round(policy: MaintenanceConfig) -> Round {
    Round { readers_grace: Duration::ZERO, ..Round::new(policy, true) }
}

/// Only expires: no partition has files enough to be compacted.
async fn maintain(sink: &IcebergSink, round: &Round) -> TableReport {
    let report = sink.maintainer().run(round).await.remove(0);
    assert!(report.errors.is_empty(), "{report:?}");
    report
}

async fn append(sink: &IcebergSink, batches: std::ops::Range<u64>) {
    for batch in batches {
        let files = vec![write(sink, 0, batch, vec![events(batch as i64 * 10, 10, HOUR_US / 60)]).await];
        sink.commit(&batch_commit(sink, batch, files).await).await.unwrap();
    }
}

async fn all_offsets(sink: &IcebergSink) -> Vec<i64> {
    offsets(sink.pin(0).await.unwrap().scan(&["_kafka_offset"], None, 100).await.unwrap()).await
}

fn listed(fixture: &Fixture) -> BTreeSet<String> {
    fn walk(folder: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found)
            } else {
                found.extend(path.to_str().map(String::from))
            };
        }
    }
    let mut found = BTreeSet::new();
    walk(&fixture.dir.path().join("warehouse"), &mut found);
    found
}

/// Every file that the table's snapshots need, as paths; reading them is the proof that they are there.
async fn reachable(sink: &IcebergSink) -> BTreeSet<String> {
    let metadata = metadata(sink, 0).await;
    let io = sink.0.file_io.clone();
    let mut found: BTreeSet<String> = metadata.metadata_log().iter().map(|m| m.metadata_file.clone()).collect();
    found.extend(sink.0.load_all().await.unwrap().iter().map(|l| l.metadata_location.clone()));
    for snapshot in metadata.snapshots() {
        found.insert(snapshot.manifest_list().to_string());
        for manifest in manifest_list(&io, &metadata, snapshot).await.unwrap().entries() {
            found.insert(manifest.manifest_path.clone());
            for entry in manifest.load_manifest(&io).await.unwrap().entries().iter().filter(|e| e.is_alive()) {
                assert!(io.exists(entry.file_path()).await.unwrap(), "{}", entry.file_path());
                found.insert(entry.file_path().to_string());
            }
        }
    }
    found.into_iter().map(|location| location.trim_start_matches("file://").to_string()).collect()
}

/// Nothing is missing and nothing is left over.
async fn tidy(fixture: &Fixture, sink: &IcebergSink) {
    let (listed, reachable) = (listed(fixture), reachable(sink).await);
    assert_eq!(listed.difference(&reachable).collect::<Vec<_>>(), Vec::<&String>::new(), "left over");
    assert_eq!(reachable.difference(&listed).collect::<Vec<_>>(), Vec::<&String>::new(), "missing");
}

fn merging(name: &str) -> TableSpec {
    let properties = HashMap::from([("commit.manifest.min-count-to-merge".to_string(), "3".to_string())]);
    TableSpec { properties: properties.into_iter().collect(), ..spec(name, &[]) }
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_expire_by_count_with_the_files_that_only_they_needed() {
    let fixture = Fixture::new();
    let sink = fixture.open(&[merging("t.events")]).await.unwrap();
    append(&sink, 0..10).await;
    let dry = maintain(&sink, &round(policy()).dry()).await;
    assert_eq!(metadata(&sink, 0).await.snapshots().len(), 10);
    let report = maintain(&sink, &round(policy())).await;
    assert_eq!((report.snapshots_expired, dry.snapshots_expired), (7, 7));
    // Seven manifest lists, and the manifests that have been merged.
    assert!(report.files_expired > 7 && report.files_expired == dry.files_expired, "{report:?} {dry:?}");
    assert_eq!(metadata(&sink, 0).await.snapshots().len(), 3);
    assert_eq!(all_offsets(&sink).await, (0..100).collect::<Vec<_>>());
    tidy(&fixture, &sink).await;
    let again = maintain(&sink, &round(policy())).await;
    assert_eq!(again, TableReport { table: "t.events".into(), ..TableReport::default() });
    // The markers are as they were, so the query goes on, and another batch merges what there is.
    append(&sink, 10..14).await;
    maintain(&sink, &round(policy())).await;
    assert_eq!(all_offsets(&sink).await, (0..140).collect::<Vec<_>>());
    tidy(&fixture, &sink).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_table_says_about_its_history_goes_first() {
    let fixture = Fixture::new();
    for (properties, kept) in [
        (vec![("history.expire.max-snapshot-age-ms", "86400000")], 8),
        (vec![("history.expire.max-snapshot-age-ms", "1")], 1),
        (vec![("history.expire.max-snapshot-age-ms", "1"), ("history.expire.min-snapshots-to-keep", "4")], 4),
        (vec![("gc.enabled", "false")], 8),
        (vec![], 3),
    ] {
        let name = format!("t.events_{}", Uuid::new_v4().simple());
        let map = properties.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let sink = fixture.open(&[TableSpec { properties: map, ..spec(&name, &[]) }]).await.unwrap();
        append(&sink, 0..8).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
        maintain(&sink, &round(policy())).await;
        assert_eq!(metadata(&sink, 0).await.snapshots().len(), kept, "{properties:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_configuration_says_where_the_table_does_not() {
    let fixture = Fixture::new();
    let age = |ms| MaintenanceConfig { max_snapshot_age: Duration::from_millis(ms), max_snapshots: 100, ..policy() };
    for (policy, properties, kept) in [
        (age(1), vec![], 1),
        (age(86_400_000), vec![], 8),
        // The fewest that the table keeps hold against age and count.
        (age(1), vec![("history.expire.min-snapshots-to-keep", "4")], 4),
        (policy(), vec![("history.expire.min-snapshots-to-keep", "5")], 5),
        (age(1), vec![("history.expire.max-snapshot-age-ms", "86400000")], 8),
    ] {
        let name = format!("t.events_{}", Uuid::new_v4().simple());
        let map = properties.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let sink = fixture.open(&[TableSpec { properties: map, ..spec(&name, &[]) }]).await.unwrap();
        append(&sink, 0..8).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
        let (round, shown) = (round(policy.clone()), format!("{policy:?} {properties:?}"));
        maintain(&sink, &round).await;
        assert_eq!(metadata(&sink, 0).await.snapshots().len(), kept, "{shown}");
    }
}

/// Changes a table as another program would.
async fn change(
    sink: &IcebergSink,
    change: impl FnOnce(iceberg::spec::TableMetadataBuilder) -> iceberg::Result<iceberg::spec::TableMetadataBuilder>,
) {
    let name = sink.0.tables[0].name.clone();
    let loaded = sink.0.catalog.load(&name).await.unwrap().unwrap();
    let change = crate::sink::iceberg::catalog::TableChange::new(&name, &loaded, change).unwrap();
    sink.0.catalog.commit(&[change]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn branches_tags_and_what_others_have_made_stay() {
    use iceberg::spec::{SnapshotReference, SnapshotRetention};
    let fixture = Fixture::new();
    let sink = fixture.open(&[merging("t.events")]).await.unwrap();
    append(&sink, 0..3).await;
    let tagged = metadata(&sink, 0).await.current_snapshot_id().unwrap();
    let tag = SnapshotReference::new(tagged, SnapshotRetention::Tag { max_ref_age_ms: None });
    change(&sink, |builder| builder.set_ref("audit", tag)).await;
    // Another program's: its summary names no query.
    let files = write(&sink, 0, 77, vec![events(1000, 5, 1)]).await;
    let pinned = sink.pin(0).await.unwrap();
    sink.append(0, &pinned, &files, &BTreeMap::new()).await.unwrap();
    let foreign = metadata(&sink, 0).await.current_snapshot_id().unwrap();
    append(&sink, 3..10).await;
    // Another query's newest batch, which may still have dead letters to publish.
    let other = fixture.another_query(&[merging("t.events")]).await;
    append(&other, 0..2).await;
    let newest = metadata(&sink, 0).await.current_snapshot_id().unwrap();
    append(&sink, 10..20).await;

    let report = maintain(&sink, &round(policy())).await;
    let after = metadata(&sink, 0).await;
    let kept: BTreeSet<i64> = after.snapshots().map(|s| s.snapshot_id()).collect();
    assert!([tagged, foreign, newest].iter().all(|id| kept.contains(id)), "{kept:?}");
    assert_eq!((kept.len(), report.snapshots_expired), (6, 17));
    tidy(&fixture, &sink).await;
    // Time travel to the tag.
    let pinned = sink.pin(0).await.unwrap();
    let rows = pinned.scan_added_by(tagged, &["_kafka_offset"], 100).await.unwrap().unwrap();
    assert_eq!(offsets(rows).await, (20..30).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn branches_and_tags_go_when_they_are_to() {
    use iceberg::spec::{SnapshotReference, SnapshotRetention};
    for (property, gone) in [("", vec!["brief"]), ("1", vec!["audit", "brief"])] {
        let fixture = Fixture::new();
        let mut wanted = merging("t.events");
        if !property.is_empty() {
            wanted.properties.insert("history.expire.max-ref-age-ms".into(), property.into());
        }
        let sink = fixture.open(&[wanted]).await.unwrap();
        append(&sink, 0..1).await;
        let head = metadata(&sink, 0).await.current_snapshot_id().unwrap();
        let marker = format!("floe-{}", Uuid::new_v4());
        let tag = |max_ref_age_ms| SnapshotReference::new(head, SnapshotRetention::Tag { max_ref_age_ms });
        for (name, age) in [("audit", None), ("brief", Some(1)), ("long", Some(86_400_000)), (&marker, None)] {
            change(&sink, |builder| builder.set_ref(name, tag(age))).await;
        }
        append(&sink, 1..10).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
        maintain(&sink, &round(policy())).await;
        let after = metadata(&sink, 0).await;
        let left = |name: &&str| after.snapshot_for_ref(name).is_none();
        assert_eq!(["audit", "brief", "long", &marker].into_iter().filter(left).collect::<Vec<_>>(), gone);
        assert!(after.snapshot_for_ref("main").is_some() && after.snapshot_by_id(head).is_some());
        assert_eq!(all_offsets(&sink).await, (0..100).collect::<Vec<_>>());
        tidy(&fixture, &sink).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_readers_may_still_have_in_hand_stay() {
    let fixture = Fixture::new();
    for (grace_s, gone) in [(300, 0), (0, 2)] {
        let name = format!("t.events_{grace_s}");
        let sink = fixture.open(&[spec(&name, &[])]).await.unwrap();
        append(&sink, 0..2).await;
        // All rows are replaced, as by an engine that overwrites the table.
        change(&sink, |builder| Ok(builder.remove_ref("main"))).await;
        append(&sink, 2..8).await;
        let expiring = MaintenanceConfig { max_snapshot_age: Duration::from_millis(1), ..policy() };
        tokio::time::sleep(Duration::from_millis(5)).await;
        maintain(&sink, &Round { readers_grace: Duration::from_secs(grace_s), ..round(expiring) }).await;
        assert_eq!(fixture.data_files(&name).len(), 8 - gone);
    }
}

/// Hours of event time, a minute between two rows.
fn hourly(name: &str, sort_by: &[&str]) -> TableSpec {
    let sort_by = sort_by.iter().map(|s| s.to_string()).collect();
    TableSpec { sort_by, ..spec(name, &["hour(event_timestamp)"]) }
}

#[tokio::test(flavor = "multi_thread")]
async fn small_files_of_quiet_partitions_become_one() {
    let fixture = Fixture::new();
    for sort_by in [&[][..], &["device_id", "count desc"]] {
        let name = format!("t.events_{}", sort_by.len());
        let sink = fixture.open(&[hourly(&name, sort_by)]).await.unwrap();
        // Six batches an hour. Event time is at the end of the fourth hour: an hour past the first two.
        append(&sink, 0..24).await;
        let dry = maintain(&sink, &round(policy()).dry()).await;
        let report = maintain(&sink, &round(policy())).await;
        assert_eq!((report.files_compacted, report.files_written), (12, 2), "{report:?}");
        assert_eq!(dry.files_compacted, 12);
        let mut rows = all_offsets(&sink).await;
        rows.sort_unstable();
        assert_eq!(rows, (0..240).collect::<Vec<_>>());

        let after = metadata(&sink, 0).await;
        let current = after.current_snapshot().unwrap();
        assert_eq!(current.summary().operation, iceberg::spec::Operation::Replace);
        let summary = &current.summary().additional_properties;
        let number = |key: &str| summary[key].as_str();
        assert_eq!((number("total-records"), number("total-data-files")), ("240", "14"));
        assert_eq!(
            (number("added-records"), number("deleted-records"), number("deleted-data-files")),
            ("60", "60", "6")
        );
        if !sort_by.is_empty() {
            let mut files = Vec::new();
            for manifest in manifest_list(&sink.0.file_io, &after, current).await.unwrap().entries() {
                let manifest = manifest.load_manifest(&sink.0.file_io).await.unwrap();
                files.extend(manifest.entries().iter().filter(|e| e.is_alive()).map(|e| e.data_file().clone()));
            }
            assert!(files.iter().all(|file| file.sort_order_id() == Some(1)));
            let compacted = files.iter().find(|file| file.record_count() == 60).unwrap();
            let path = compacted.file_path().trim_start_matches("file://");
            let reader = parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(
                std::fs::File::open(path).unwrap(),
            );
            let mut keys = Vec::new();
            for rows in reader.unwrap().build().unwrap() {
                use arrow::array::AsArray;
                let rows = rows.unwrap();
                let devices = rows["device_id"].as_string::<i32>();
                let counts = rows["count"].as_primitive::<arrow::datatypes::Int32Type>();
                keys.extend((0..rows.num_rows()).map(|i| (devices.value(i).to_string(), -counts.value(i))));
            }
            assert_eq!(keys.len(), 60);
            assert!(keys.is_sorted(), "{keys:?}");
        }

        // It goes on, and what the replaced files needed goes with their snapshots.
        append(&sink, 24..30).await;
        maintain(&sink, &round(policy())).await;
        append(&sink, 30..33).await;
        maintain(&sink, &round(policy())).await;
        maintain(&sink, &round(policy())).await;
        let mut rows = all_offsets(&sink).await;
        rows.sort_unstable();
        assert_eq!(rows, (0..330).collect::<Vec<_>>());
        assert_eq!(
            fixture.data_files(&name).len(),
            reachable(&sink).await.iter().filter(|f| f.ends_with("parquet")).count()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_gives_way_to_whoever_changed_the_files_first() {
    let fixture = Fixture::new();
    let sink = fixture.open(&[hourly("t.events", &[])]).await.unwrap();
    append(&sink, 0..24).await;
    let maintainer = sink.maintainer();
    let name = sink.0.tables[0].name.clone();
    let planned = sink.0.load_all().await.unwrap().remove(0);
    let layout =
        Arc::new(crate::sink::iceberg::files::FileLayout::of(&name, &planned.metadata, &sink.0.file_io).unwrap());
    let round = round(policy());
    let found = maintainer.find(&planned.metadata, &layout, &round).await.unwrap();
    assert_eq!(found.groups.len(), 2);
    let files = rewrite::rewrite(&layout, &found.groups[0], &round).await.unwrap().unwrap();
    // A batch in between does no harm, even one that merges the manifests.
    append(&sink, 24..80).await;
    // Someone else compacts the same files.
    let rivals = rewrite::rewrite(&layout, &found.groups[0], &round).await.unwrap().unwrap();
    assert!(maintainer.replace(&name, &planned, &layout, &found.groups[0], &found, &rivals).await.unwrap());
    assert!(!maintainer.replace(&name, &planned, &layout, &found.groups[0], &found, &files).await.unwrap());
    let mut rows = all_offsets(&sink).await;
    rows.sort_unstable();
    assert_eq!(rows, (0..800).collect::<Vec<_>>());
    // What was written for nothing is gone.
    let mut missing = files.iter().map(|f| f.file_path().trim_start_matches("file://").to_string());
    assert!(missing.all(|file| !Path::new(&file).exists()));
}

/// Sends every commit twice, like a proxy that has lost the first answer; batches go on before the second one is refused.
#[derive(Debug)]
struct Doubling {
    sink: IcebergSink,
    shows_history: bool,
}

#[async_trait::async_trait]
impl Catalog for Doubling {
    fn commits_together(&self) -> bool {
        false
    }

    fn guards_properties(&self) -> bool {
        true
    }

    async fn load(&self, table: &TableName) -> Result<Option<LoadedTable>, Error> {
        let mut loaded = self.sink.0.catalog.load(table).await?.unwrap();
        if !self.shows_history {
            let current = loaded.metadata.current_snapshot_id();
            let hidden = loaded.metadata.snapshots().map(|s| s.snapshot_id()).filter(|id| Some(*id) != current);
            let hidden: Vec<i64> = hidden.collect();
            let builder = loaded.metadata.as_ref().clone().into_builder(None);
            loaded.metadata = Arc::new(builder.remove_snapshots(&hidden).build().unwrap().metadata);
        }
        Ok(Some(loaded))
    }

    async fn create(&self, _: &TableName, _: iceberg::TableCreation) -> Result<LoadedTable, Error> {
        unreachable!()
    }

    async fn commit(&self, changes: &[TableChange]) -> Result<(), CommitError> {
        self.sink.0.catalog.commit(changes).await?;
        let next = self.sink.load().await.unwrap()[0].marker.as_ref().unwrap().batch + 1;
        append(&self.sink, next..next + 2).await;
        self.sink.0.catalog.commit(changes).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_that_meets_its_own_commit_has_happened() {
    for shows_history in [true, false] {
        let fixture = Fixture::new();
        let sink = fixture.open(&[hourly("t.events", &[])]).await.unwrap();
        append(&sink, 0..24).await;
        let catalog = Arc::new(Doubling { sink: sink.clone(), shows_history });
        let maintainer = Maintainer::new(catalog, sink.0.storage.clone(), vec![sink.0.tables[0].name.clone()]);
        let keep = MaintenanceConfig { max_snapshots: 1_000, ..policy() };
        let report = maintainer.run(&round(keep)).await.remove(0);
        assert!(report.errors.is_empty(), "{report:?}");
        assert_eq!((report.files_compacted, report.files_written), (12, 2), "{report:?}");
        let mut rows = all_offsets(&sink).await;
        rows.sort_unstable();
        assert_eq!(rows, (0..280).collect::<Vec<_>>());
        reachable(&sink).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn maintenance_beside_batches_loses_nothing() {
    let fixture = Fixture::new();
    let sink = fixture.open(&[hourly("t.events", &[])]).await.unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let (beside, stop) = (sink.clone(), done.clone());
    let maintenance = tokio::spawn(async move {
        let mut compacted = 0;
        loop {
            // The last round has the table for itself, however little of the machine those before it have got.
            let last = stop.load(Ordering::Relaxed);
            compacted += maintain(&beside, &round(policy())).await.files_compacted;
            if last {
                return compacted;
            }
        }
    });
    for batch in 0..60 {
        let files = vec![write(&sink, 0, batch, vec![events(batch as i64 * 10, 10, HOUR_US / 60)]).await];
        let commit = batch_commit(&sink, batch, files).await;
        // Maintenance without a pause may be faster twenty times over: a query tries again then.
        while let Err(error) = sink.commit(&commit).await {
            assert_eq!(error.kind(), Kind::Transient, "{error}");
        }
    }
    done.store(true, Ordering::Relaxed);
    assert!(maintenance.await.unwrap() > 0);
    let mut rows = all_offsets(&sink).await;
    rows.sort_unstable();
    assert_eq!(rows, (0..600).collect::<Vec<_>>());
    reachable(&sink).await;
}

fn put_old(path: &Path, days: u64) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let file = std::fs::File::create(path).unwrap();
    file.set_modified(std::time::SystemTime::now() - Duration::from_secs(days * 86_400)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_nothing_references_go_once_they_are_old() {
    let fixture = Fixture::new();
    let sink = fixture.open(&[hourly("t.events", &[])]).await.unwrap();
    append(&sink, 0..10).await;
    // However old what the table has is, it stays.
    for file in listed(&fixture) {
        let old = std::time::SystemTime::now() - Duration::from_secs(30 * 86_400);
        std::fs::File::open(file).unwrap().set_modified(old).unwrap();
    }
    let before = listed(&fixture);
    let folder = fixture.dir.path().join("warehouse/t/events");
    let orphans =
        ["data/a=1/left-behind.parquet", "data/left-behind.parquet", "metadata/left-m0.avro", "metadata/snap-1.avro"];
    orphans.iter().for_each(|file| put_old(&folder.join(file), 4));
    let strangers =
        ["data/young.parquet", "metadata/young.avro", "data/_SUCCESS", "metadata/version-hint.text", "notes.txt"];
    for (file, days) in strangers.iter().zip([2, 2, 30, 30, 30]) {
        put_old(&folder.join(file), days);
    }
    let no_compaction = MaintenanceConfig { max_snapshots: 100, ..policy() };
    let report = maintain(&sink, &round(no_compaction.clone())).await;
    assert_eq!(report.orphans_removed, 4, "{report:?}");
    let mut after = listed(&fixture);
    for file in strangers {
        assert!(after.remove(folder.join(file).to_str().unwrap()), "{file}");
    }
    assert!(before.is_subset(&after));
    reachable(&sink).await;

    // Another table in the same folder: none of its files is an orphan.
    let other = before.iter().find(|f| f.ends_with(".metadata.json")).unwrap();
    let json = std::fs::read_to_string(other).unwrap();
    let uuid = metadata(&sink, 0).await.uuid().to_string();
    std::fs::write(folder.join("metadata/00000-other.metadata.json"), json.replace(&uuid, &Uuid::new_v4().to_string()))
        .unwrap();
    put_old(&folder.join("data/of-the-other.parquet"), 30);
    let report = sink.maintainer().run(&round(no_compaction)).await.remove(0);
    assert!(report.errors[0].contains("metadata of another table"), "{report:?}");
    assert!(folder.join("data/of-the-other.parquet").exists());
}
