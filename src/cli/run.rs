//! `floe run`: a query as a service, and the signals that stop it.
//!
//! The first SIGTERM or SIGINT lets the batch in hand finish and commit; the second one, or `execution.shutdown_timeout`,
//! ends the process at once. That is safe at any moment: the next start takes up where the checkpoint says.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};

use super::Error;
use crate::config::Config;

pub async fn run(config: Config) -> Result<(), Error> {
    let shutdown = on_signals(config.execution.shutdown_timeout)?;
    Ok(crate::query::run(config, shutdown).await?)
}

/// Turns true with the first signal. A task of its own ends the process when that has to be at once, whatever the query
/// is doing by then.
pub fn on_signals(timeout: Duration) -> Result<watch::Receiver<bool>, Error> {
    let listen = |kind| signal(kind).map_err(|e| Error::Other(format!("cannot listen for signals: {e}")));
    let (received, signals) = mpsc::channel(2);
    for (kind, number) in [(SignalKind::terminate(), libc::SIGTERM), (SignalKind::interrupt(), libc::SIGINT)] {
        tokio::spawn(forward(listen(kind)?, number, received.clone()));
    }
    let (stop, shutdown) = watch::channel(false);
    tokio::spawn(async move {
        let number = until_forced(signals, stop, timeout).await;
        exit_at_once(128 + number);
    });
    Ok(shutdown)
}

async fn forward(mut signal: Signal, number: i32, received: mpsc::Sender<i32>) {
    while signal.recv().await.is_some() {
        if received.send(number).await.is_err() {
            return;
        }
    }
}

/// Asks for a stop at the first signal and returns the number of the one to die by, when waiting is over.
async fn until_forced(mut signals: mpsc::Receiver<i32>, stop: watch::Sender<bool>, timeout: Duration) -> i32 {
    let Some(first) = signals.recv().await else { return std::future::pending().await };
    tracing::info!(signal = first, "stopping: the batch in hand is finished first; a second signal exits at once");
    stop.send_replace(true);
    match tokio::time::timeout(timeout, signals.recv()).await {
        Ok(Some(second)) => {
            tracing::warn!(signal = second, "exiting at once; the batch in hand is done again at the next start");
            second
        }
        Ok(None) => std::future::pending().await,
        Err(_) => {
            tracing::warn!(
                ?timeout,
                "the batch in hand takes longer than execution.shutdown_timeout: exiting; it is done again at the next start"
            );
            first
        }
    }
}

/// Without the exit handlers of the C libraries, whose threads are still at work.
fn exit_at_once(code: i32) -> ! {
    // SAFETY: ends the process; stderr, the only stream written to, is not buffered.
    #[allow(unsafe_code)]
    unsafe {
        libc::_exit(code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(timeout: Duration) -> (mpsc::Sender<i32>, watch::Receiver<bool>, tokio::task::JoinHandle<i32>) {
        let (received, signals) = mpsc::channel(2);
        let (stop, shutdown) = watch::channel(false);
        (received, shutdown, tokio::spawn(until_forced(signals, stop, timeout)))
    }

    const LONG: Duration = Duration::from_secs(3_600);

    #[tokio::test]
    async fn the_first_signal_asks_and_the_second_one_forces() {
        let (received, mut shutdown, forced) = start(LONG);
        received.send(libc::SIGTERM).await.unwrap();
        shutdown.wait_for(|stop| *stop).await.unwrap();
        assert!(!forced.is_finished());
        received.send(libc::SIGINT).await.unwrap();
        assert_eq!(forced.await.unwrap(), libc::SIGINT);
    }

    #[tokio::test]
    async fn the_timeout_forces_too() {
        let (received, mut shutdown, forced) = start(Duration::from_millis(20));
        received.send(libc::SIGTERM).await.unwrap();
        assert_eq!(forced.await.unwrap(), libc::SIGTERM);
        assert!(*shutdown.borrow_and_update());
    }

    #[tokio::test]
    async fn without_a_signal_nothing_happens() {
        let (_received, shutdown, forced) = start(Duration::from_millis(1));
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!forced.is_finished() && !*shutdown.borrow());
        forced.abort();
    }
}
