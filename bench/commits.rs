//! Commits of three tables, thousands of them, with maintenance as in a service: that the last ones take no longer than the
//! early ones, that metadata on disk stays small, and that planning a scan does not slow down.
//!
//!   cargo bench --bench commits -- [commits]     default 3000
//!   FLOE_BENCH_DIR=/dev/shm                      where fsync is free: what a commit costs besides
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::{Duration, Instant};

use support::commits::{COMMITS_A_ROUND, Commits, TABLES, median};

fn main() {
    let argument = std::env::args().skip(1).find(|a| !a.starts_with("--")).map(|a| a.replace('_', ""));
    let count = argument.map_or(3_000, |a| a.parse().expect("the number of commits"));
    let folder = match std::env::var_os("FLOE_BENCH_DIR") {
        Some(parent) => tempfile::tempdir_in(parent),
        None => tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")),
    };
    let folder = folder.expect("a folder");
    let commits = Commits::new(folder.path());
    let tables = commits.tables();
    let mut times = Vec::new();
    let (mut early, mut maintenance) = (Duration::ZERO, Duration::ZERO);
    println!("{:>8} {:>12} {:>12} {:>14} {:>12}", "commits", "median", "slowest", "metadata MiB", "plan");
    for batch in 0..count {
        times.push(commits.commit(batch));
        if batch % COMMITS_A_ROUND == COMMITS_A_ROUND - 1 {
            let from = Instant::now();
            commits.maintain();
            maintenance += from.elapsed();
        }
        let done = times.len();
        if done.is_multiple_of(100) && (done <= 300 || done.is_multiple_of(500)) || done as u64 == count {
            let last = &times[done.saturating_sub(100)..];
            let plan: Duration = TABLES.iter().map(|table| tables.plan(table).0).sum();
            if done == 200 {
                early = plan;
            }
            println!(
                "{done:>8} {:>12.1?} {:>12.1?} {:>14.2} {:>12.1?}",
                median(last),
                last.iter().max().copied().unwrap_or_default(),
                commits.metadata_bytes() as f64 / f64::from(1 << 20),
                plan
            );
        }
    }
    if times.len() > 300 {
        let (from, to) = (median(&times[100..200]), median(&times[times.len() - 100..]));
        let plan: Duration = TABLES.iter().map(|table| tables.plan(table).0).sum();
        println!("commit: x{:.2} from commits 100..200 to the last 100", to.as_secs_f64() / from.as_secs_f64());
        println!("plan:   x{:.2} from commit 200 to the last", plan.as_secs_f64() / early.as_secs_f64());
    }
    println!("maintenance took {maintenance:.1?} in all");
    for table in TABLES {
        let rows: i64 = tables.value(&format!("select count(*) from {{{table}}}"));
        assert_eq!(rows, count as i64 * support::commits::ROWS, "{table}");
    }
}
