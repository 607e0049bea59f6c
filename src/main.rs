use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use floe::cli::{Cli, Error};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    execute(Cli::parse()).unwrap_or_else(|error| {
        // Nothing can be done for someone who has closed stderr.
        let _ = writeln!(std::io::stderr(), "floe: {error}");
        ExitCode::from(error.downcast_ref::<Error>().map_or(1, Error::exit_code))
    })
}

fn execute(cli: Cli) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(cli.execute());
    // A thread that still waits for a broker must not hold up the exit.
    runtime.shutdown_background();
    Ok(result?)
}
