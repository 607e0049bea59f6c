use std::fs;
use std::time::Duration;

use crate::support::floe::{Floe, floe};
use crate::support::turn;

/// On a fresh clone with nothing else running; it has checked itself, or it would not exit with 0.
#[test]
fn runs_checks_itself_and_says_where_the_tables_are() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let mut command = floe();
    command.args(["demo", "--seconds", "5"]).current_dir(dir.path());
    let ended = Floe::start(command, dir.path(), 1, String::new()).wait().expect_code(0);
    // Lines to paste, for both readers.
    let ended = ended.expect_output(&["duckdb", "pyiceberg"]);
    let data = fs::read_dir(dir.path().join("data")).map(|d| d.count()).unwrap_or(0);
    assert!(data > 0, "nothing under data/\n{}", ended.output);
}

#[test]
fn ctrl_c_ends_it_with_its_summary() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let mut command = floe();
    command.args(["demo", "--seconds", "300"]).current_dir(dir.path());
    let mut running = Floe::start(command, dir.path(), 1, String::new());
    running.until("there is output", |floe| (floe.output().lines().count() > 6).then_some(()));
    std::thread::sleep(Duration::from_secs(2));
    running.signal(libc::SIGINT);
    running.wait().expect_code(0).expect_output(&["pyiceberg"]);
}
