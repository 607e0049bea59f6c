use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use floe::checkpoint::Checkpoint;
use floe::storage::Location;

use crate::support::broker::Broker;
use crate::support::check::{
    DEAD_LETTERS, ROWS, WINDOWS, each_offset_once, everything, fill, offsets_in_tables, produced,
};
use crate::support::floe::{Ended, Pipeline};
use crate::support::telemetry::Telemetry;
use crate::support::turn;

fn telemetry() -> Telemetry {
    Telemetry { messages: 2_000, ..Telemetry::default() }
}

fn pipeline(topic: &str) -> Pipeline {
    let broker = Broker::shared();
    fill(broker, topic, &telemetry());
    let mut pipeline = Pipeline::new(&broker.bootstrap, topic);
    pipeline.set("source.max_offsets_per_trigger", 500);
    pipeline
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}

fn replace(checkpoint: &Path, copy_of_it: &Path) {
    fs::remove_dir_all(checkpoint).unwrap();
    copy(copy_of_it, checkpoint);
}

/// The newest numbered file in a folder of the checkpoint, and its number.
fn newest(checkpoint: &Path, folder: &str) -> (PathBuf, u64) {
    let files = fs::read_dir(checkpoint.join(folder)).unwrap().map(|e| e.unwrap().path());
    let number = |p: &PathBuf| p.file_stem().and_then(|s| s.to_str()?.parse().ok());
    files.filter_map(|p| number(&p).map(|n| (p, n))).max_by_key(|(_, n)| *n).expect("a numbered file")
}

/// Whole numbers in a text: `batch 12` names 12 and neither 1 nor 2.
fn numbers(text: &str) -> BTreeSet<u64> {
    text.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}

/// Why the process ended: the last lines, since the log before them names every batch.
fn reason(ended: &Ended) -> String {
    let lines: Vec<&str> = ended.output.lines().collect();
    lines[lines.len().saturating_sub(4)..].join("\n")
}

/// Copies made after every batch; each is put back, with its state and without, when the tables have moved on.
#[test]
fn every_older_copy_is_refused() {
    let _turn = turn();
    let pipeline = pipeline("older_copies");
    let broker = Broker::shared();
    let checkpoint = pipeline.checkpoint();
    let copies = pipeline.dir().join("copies");
    let mut batches = Vec::new();
    // Between two batches, and in the middle of one.
    for step in
        ["commit_log.after_put:kill", "plan.after_put:kill", "commit_log.after_put:kill", "commit_log.after_put:kill"]
    {
        pipeline.run_failing(step).expect_killed();
        let batch = newest(&checkpoint, "offsets").1;
        copy(&checkpoint, &copies.join(batches.len().to_string()));
        batches.push(batch);
    }
    pipeline.run();
    everything(&pipeline, broker, &telemetry());
    let last = newest(&checkpoint, "commits").1;
    let newest_copy = copies.join("newest");
    copy(&checkpoint, &newest_copy);

    for (index, batch) in batches.iter().enumerate() {
        for with_state in [true, false] {
            replace(&checkpoint, &copies.join(index.to_string()));
            if !with_state {
                fs::remove_dir_all(checkpoint.join("state")).unwrap_or_default();
            }
            let ended = pipeline.spawn().wait().expect_code(3);
            let reason = reason(&ended);
            if with_state {
                let named = numbers(&reason);
                // The copy's newest batch, or the one that it would do next.
                assert!(
                    named.contains(&last) && (named.contains(batch) || named.contains(&(batch + 1))),
                    "batch {batch} of the copy and {last} of the tables are not named in\n{reason}"
                );
            }
            everything(&pipeline, broker, &telemetry());
        }
    }
    // The newest copy is as good as the original.
    replace(&checkpoint, &newest_copy);
    pipeline.run();
    everything(&pipeline, broker, &telemetry());
}

#[test]
fn a_table_dropped_and_recreated_is_refused() {
    let _turn = turn();
    let pipeline = pipeline("recreated");
    pipeline.run_failing("commit_log.after_put:kill:2").expect_killed();
    let tables = pipeline.tables();
    let saved = pipeline.dir().join("saved.db");
    let catalog = rusqlite::Connection::open(pipeline.catalog()).unwrap();
    catalog.execute("vacuum into ?1", [saved.to_str()]).unwrap();
    drop(catalog);
    for table in [ROWS, WINDOWS, DEAD_LETTERS] {
        tables.recreate(table);
        pipeline.spawn().wait().expect_code(3).expect_output(&[table]);
        assert_eq!(tables.value::<u64>(&format!("select count(*) from {{{table}}}")), 0, "{table}");
        for suffix in ["-wal", "-shm"] {
            let _ = fs::remove_file(pipeline.dir().join(format!("catalog.db{suffix}")));
        }
        fs::copy(&saved, pipeline.catalog()).unwrap();
    }
    pipeline.run();
    everything(&pipeline, Broker::shared(), &telemetry());
}

/// Of tables that are missing none is created before somebody has looked what has become of them; nor is a catalog.
#[test]
fn a_table_that_is_gone_is_refused_and_not_created() {
    let _turn = turn();
    let mut pipeline = pipeline("gone");
    pipeline.run_failing("commit_log.after_put:kill:2").expect_killed();
    let names = |catalog: &rusqlite::Connection| -> Vec<String> {
        let mut rows = catalog.prepare("select table_namespace || '.' || table_name from iceberg_tables").unwrap();
        rows.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect::<BTreeSet<_>>().into_iter().collect()
    };
    for lost in [false, true] {
        let catalog = rusqlite::Connection::open(pipeline.catalog()).unwrap();
        let sql = "delete from iceberg_tables where table_namespace || '.' || table_name = ?1";
        if !lost {
            assert_eq!(catalog.execute(sql, [DEAD_LETTERS]).unwrap(), 1);
        } else {
            fs::remove_dir_all(pipeline.checkpoint()).unwrap();
        }
        drop(catalog);
        let said = if lost { "floe recover --from-table" } else { "telemetry.dead_letters (uuid " };
        pipeline.spawn().wait().expect_code(3).expect_output(&[said]);
        let catalog = rusqlite::Connection::open(pipeline.catalog()).unwrap();
        assert_eq!(names(&catalog), [WINDOWS, ROWS], "lost: {lost}");
    }
    pipeline.set("catalog.path", pipeline.dir().join("other.db").display().to_string());
    pipeline.set("catalog.warehouse", pipeline.dir().join("other").display().to_string());
    pipeline.run_failing("commit_log.after_put:kill:1").expect_killed();
    fs::rename(pipeline.dir().join("other.db"), pipeline.dir().join("away.db")).unwrap();
    pipeline.spawn().wait().expect_code(3).expect_output(&["is not in the catalog"]);
    assert!(!pipeline.dir().join("other.db").exists());
}

/// Else everything would be read a second time.
#[test]
fn a_deleted_checkpoint_is_refused_while_the_tables_know_the_pipeline() {
    let _turn = turn();
    let pipeline = pipeline("deleted_checkpoint");
    pipeline.run();
    let kept = pipeline.dir().join("kept");
    fs::rename(pipeline.checkpoint(), &kept).unwrap();
    for _ in 0..2 {
        // The second time there may be a new, empty checkpoint.
        let ended = pipeline.spawn().wait().expect_code(3);
        let reason = reason(&ended).to_lowercase();
        for part in ["checkpoint", "telemetry"] {
            assert!(reason.contains(part), "{part:?} is not in\n{reason}");
        }
        assert_eq!(offsets_in_tables(&pipeline.tables()), telemetry().messages);
    }
    let _ = fs::remove_dir_all(pipeline.checkpoint());
    fs::rename(kept, pipeline.checkpoint()).unwrap();
    pipeline.run();
    everything(&pipeline, Broker::shared(), &telemetry());
}

/// A checkpoint as a query has left it, in a batch that is logged and not committed: every kind of file counts.
fn left_behind(topic: &str) -> Pipeline {
    let pipeline = pipeline(topic);
    pipeline.run_failing("plan.after_put:kill:3").expect_killed();
    pipeline
}

fn files_that_count(checkpoint: &Path) -> Vec<PathBuf> {
    let mut files = vec![checkpoint.join("metadata.json")];
    files.extend(["owners", "offsets", "commits"].map(|folder| newest(checkpoint, folder).0));
    let (_, committed) = newest(checkpoint, "commits");
    let state = fs::read_dir(checkpoint.join("state")).unwrap().map(|e| e.unwrap().path());
    let of_commit = format!("{committed:020}-");
    files.extend(state.filter(|p| p.file_name().unwrap().to_str().unwrap().starts_with(&of_commit)));
    assert!(files.len() >= 5, "{files:?}");
    files
}

#[test]
fn every_flipped_byte_is_named() {
    let _turn = turn();
    let pipeline = left_behind("flipped");
    let checkpoint = pipeline.checkpoint();
    let location = Location {
        store: Arc::new(object_store::local::LocalFileSystem::new()),
        prefix: object_store::path::Path::from_absolute_path(&checkpoint).unwrap(),
        url: format!("file://{}", checkpoint.display()),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let read = || {
        runtime.block_on(async {
            let mut checkpoint = Checkpoint::open(location.clone(), "telemetry").await?;
            checkpoint.claim().await?;
            let recovered = checkpoint.recover().await?;
            Ok::<_, floe::checkpoint::Error>(recovered)
        })
    };
    let whole = read().expect("an undamaged checkpoint");
    let mut flipped = 0;
    // Every byte of a state file: the tests of the state store.
    for file in files_that_count(&checkpoint).into_iter().filter(|f| f.extension().is_some_and(|e| e == "json")) {
        let bytes = fs::read(&file).unwrap();
        let name = file.file_name().unwrap().to_str().unwrap();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            fs::write(&file, damaged).unwrap();
            let outcome = read().map(drop);
            let error = outcome.expect_err(&format!("byte {at} of {name} is flipped")).to_string();
            assert!(error.contains(name), "byte {at} of {name}: {error}");
            flipped += 1;
        }
        fs::write(&file, bytes).unwrap();
    }
    assert_eq!(read().expect("an undamaged checkpoint"), whole);
    assert!(flipped > 1_000, "{flipped}");

    // The same for a user: the process names the file and ends, and a repaired file is all that it takes to go on.
    let before = offsets_in_tables(&pipeline.tables());
    for file in files_that_count(&checkpoint) {
        let bytes = fs::read(&file).unwrap();
        let mut damaged = bytes.clone();
        damaged[bytes.len() / 2] ^= 1;
        fs::write(&file, damaged).unwrap();
        let name = file.file_name().unwrap().to_str().unwrap();
        pipeline.spawn().wait().expect_code(3).expect_output(&[name]);
        assert_eq!(offsets_in_tables(&pipeline.tables()), before);
        fs::write(&file, bytes).unwrap();
    }
    pipeline.run();
    everything(&pipeline, Broker::shared(), &telemetry());
}

#[test]
fn a_missing_file_is_named() {
    let _turn = turn();
    let pipeline = left_behind("missing_files");
    let checkpoint = pipeline.checkpoint();
    for file in files_that_count(&checkpoint) {
        let name = file.file_name().unwrap().to_str().unwrap().to_string();
        // Without its plan a batch has not been begun: that is a state a checkpoint can be in. Nothing rests on the file of
        // an owner that is gone.
        if ["offsets", "owners"].iter().any(|folder| file.parent().unwrap().ends_with(folder)) {
            continue;
        }
        let bytes = fs::read(&file).unwrap();
        fs::remove_file(&file).unwrap();
        pipeline.spawn().wait().expect_code(3).expect_output(&[&name]);
        fs::write(&file, bytes).unwrap();
    }
    pipeline.run();
    everything(&pipeline, Broker::shared(), &telemetry());
}

/// A setting that changes what a batch means cannot change under a batch that is already planned.
#[test]
fn a_logged_plan_is_replayed_as_it_was_planned() {
    let _turn = turn();
    let mut pipeline = left_behind("replayed");
    let planned = newest(&pipeline.checkpoint(), "offsets");
    let bytes = fs::read(&planned.0).unwrap();
    pipeline.set("source.max_offsets_per_trigger", 7_000);
    pipeline.run_failing("commit_log.after_put:kill").expect_killed();
    assert_eq!(fs::read(&planned.0).unwrap(), bytes);
    assert_eq!(offsets_in_tables(&pipeline.tables()), 1_500);
    pipeline.run();
    let tables = pipeline.tables();
    each_offset_once(&tables, "replayed", &produced(Broker::shared(), "replayed", telemetry().partitions));
    everything(&pipeline, Broker::shared(), &telemetry());
}

/// A batch that no table has may be executed with other settings than it was planned with. Once a table has it, what was
/// executed is what counts, and other settings are refused until its commit is logged.
#[test]
fn a_planned_batch_is_not_executed_with_other_settings() {
    let _turn = turn();
    let mut pipeline = pipeline("other_settings");
    pipeline.run_failing("commit_log.before_put:kill:3").expect_killed();
    let before = offsets_in_tables(&pipeline.tables());
    assert_eq!(before, 1_500);
    pipeline.set("transform.filter", "duration_ms < 5000");
    pipeline.spawn().wait().expect_code(3).expect_output(&["batch 2"]);
    assert_eq!(offsets_in_tables(&pipeline.tables()), before);
    pipeline.remove("transform");
    pipeline.run();
    everything(&pipeline, Broker::shared(), &telemetry());
}

#[test]
fn a_planned_batch_that_no_table_has_is_executed_with_the_settings_of_now() {
    let _turn = turn();
    let mut pipeline = left_behind("newer_settings");
    let before = offsets_in_tables(&pipeline.tables());
    // Other tables than those it was planned for cannot tell whether it is in them.
    pipeline.set("rows.table", "telemetry.other");
    pipeline.spawn().wait().expect_code(3).expect_output(&["batch 2"]);
    pipeline.set("rows.table", "telemetry.events");
    // Killed once the tables have it: from now on it is the batch of these settings, and of no others.
    pipeline.set("transform.filter", "duration_ms is null");
    pipeline.run_failing("commit_log.before_put:kill").expect_killed();
    let dead = telemetry().truth().dead_letters();
    pipeline.remove("transform");
    pipeline.spawn().wait().expect_code(3).expect_output(&["batch 2"]);
    pipeline.set("transform.filter", "duration_ms is null");
    pipeline.run();
    let tables = pipeline.tables();
    let rows: u64 = tables.value("select count(*) from {telemetry.events}");
    let filtered: u64 = tables.value("select count(*) from {telemetry.events} where duration_ms is null");
    let refused: u64 = tables.value("select count(*) from {telemetry.dead_letters}");
    assert_eq!(refused, dead);
    assert!(rows <= before && rows > 0 && filtered == 0, "{rows} rows, {filtered} without a duration, {before} before");
}
