//! What the tests stand on: a real broker, the real binary, other people's readers, and a generator that knows the truth.
#![allow(dead_code)]

pub mod broker;
pub mod catalogs;
pub mod check;
pub mod commits;
pub mod floe;
pub mod proxy;
pub mod reader;
pub mod s3;
pub mod spark;
pub mod telemetry;
pub mod tls;

use std::sync::{Condvar, Mutex};

/// A test that needs much of the machine takes a turn: at most this many at a time, whatever the number of test threads.
const TURNS: usize = 2;

static FREE: (Mutex<usize>, Condvar) = (Mutex::new(TURNS), Condvar::new());

pub struct Turn;

/// Waits for a turn; it ends when the value is dropped.
pub fn turn() -> Turn {
    let mut free = FREE.0.lock().unwrap_or_else(|e| e.into_inner());
    while *free == 0 {
        free = FREE.1.wait(free).unwrap_or_else(|e| e.into_inner());
    }
    *free -= 1;
    Turn
}

impl Drop for Turn {
    fn drop(&mut self) {
        *FREE.0.lock().unwrap_or_else(|e| e.into_inner()) += 1;
        FREE.1.notify_one();
    }
}
