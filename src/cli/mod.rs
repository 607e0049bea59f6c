//! One file a subcommand. Owns: arguments, signals, exit codes, what goes to the terminal. Does not own: anything that a
//! query does.

mod beside;
pub mod check;
pub mod demo;
pub mod dlq;
pub mod maintain;
pub mod plan;
pub mod resume;
pub mod run;
pub mod state;
pub mod watermark;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::{Config, ConfigErrors};

/// Kafka topics in, Apache Iceberg tables out, exactly once.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done, 2 wrong configuration, 3 needs a person (data loss, schema conflict, another \
                          owner), 1 anything else.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a pipeline until it is stopped, or with `available_now` until it has read what there is.
    Run(File),
    /// Look for every mistake in a configuration, then try broker, catalog and stores. Creates no table.
    Check(File),
    /// Commit the batch that the circuit breaker holds back, with its dead letters, and go on.
    Resume(File),
    /// Say what has changed since the checkpoint was written, whether each change is safe, and whether `run` would go on (exit
    /// code 0) or refuse (3).
    Plan {
        #[command(flatten)]
        file: File,
        /// One JSON object.
        #[arg(long)]
        json: bool,
        /// Agree that the open windows of tables that were removed, or have other windows now, are dropped.
        #[arg(long)]
        apply: bool,
    },
    /// Show the open windows of a pipeline, their groups and bytes, as the checkpoint has them.
    State(File),
    /// Expire snapshots, compact small files and remove orphans of a pipeline's tables, once, and say what was done.
    Maintain {
        #[command(flatten)]
        file: File,
        /// Only say what there is to do.
        #[arg(long)]
        dry_run: bool,
    },
    /// Say where the watermark is, which partition holds it back since when, and which windows it closes next. Reads the
    /// checkpoint alone, whether the pipeline runs or not.
    Watermark {
        #[command(flatten)]
        file: File,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Rebuild a lost checkpoint, so that the pipeline goes on where its tables are. Never overwrites one.
    Recover {
        /// From the pipeline's own tables; windows that were still open are aggregated again from its rows table, or from Kafka.
        #[arg(long, required = true)]
        from_table: bool,
        /// Go on without those open windows that can be had from neither; otherwise nothing is rebuilt then. It is said what
        /// they lack.
        #[arg(long)]
        drop_open_windows: bool,
        #[command(flatten)]
        file: File,
    },
    /// The whole pipeline with nothing else running: an embedded broker, a stream of telemetry, tables on this machine,
    /// checked at the end.
    Demo(demo::DemoOptions),
    /// Look at dead letters, and try them again.
    #[command(subcommand)]
    Dlq(dlq::Dlq),
}

#[derive(Debug, Args)]
pub struct File {
    /// The pipeline's configuration, TOML.
    #[arg(env = "FLOE_CONFIG")]
    file: PathBuf,
}

/// Why a command has not succeeded. The message is for the terminal.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the configuration is wrong:\n{0}")]
    Config(ConfigErrors),
    #[error("{0}")]
    Variable(String),
    #[error("{0}")]
    Query(#[from] crate::error::Error),
    #[error("{0}")]
    Demo(#[from] demo::Error),
    #[error("{failed} of {probes} probes failed")]
    Check { failed: usize, probes: usize },
    #[error("{0}")]
    Other(String),
}

impl Error {
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Config(_) | Error::Variable(_) => 2,
            Error::Query(e) => e.exit_code(),
            Error::Demo(demo::Error::Query(e)) => e.exit_code(),
            Error::Demo(_) | Error::Check { .. } | Error::Other(_) => 1,
        }
    }
}

impl Cli {
    pub async fn execute(self) -> Result<ExitCode, Error> {
        match self.command {
            Command::Run(File { file }) => {
                crate::telemetry::init_logs().map_err(Error::Variable)?;
                run::run(load(&file)?).await?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Check(File { file }) => {
                crate::telemetry::init_logs_at("error").map_err(Error::Variable)?;
                check::check(&load(&file)?).await?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Resume(File { file }) => {
                crate::telemetry::init_logs_at("error").map_err(Error::Variable)?;
                let done = resume::resume(&load(&file)?).await?;
                writeln!(std::io::stdout(), "{done}").map_err(|e| Error::Other(e.to_string()))?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Plan { file, json, apply } => {
                crate::telemetry::init_logs_at("error").map_err(Error::Variable)?;
                let plan = plan::plan(&load(&file.file)?, json, apply).await?;
                writeln!(std::io::stdout(), "{}", plan.text).map_err(|e| Error::Other(e.to_string()))?;
                Ok(if plan.goes_on { ExitCode::SUCCESS } else { ExitCode::from(3) })
            }
            Command::State(File { file }) => {
                crate::telemetry::init_logs_at("error").map_err(Error::Variable)?;
                let text = state::state(&load(&file)?).await?;
                std::io::stdout().write_all(text.as_bytes()).map_err(|e| Error::Other(e.to_string()))?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Maintain { file: File { file }, dry_run } => {
                crate::telemetry::init_logs_at("error").map_err(Error::Variable)?;
                let reports = maintain::maintain(&load(&file)?, dry_run).await?;
                let mut out = std::io::stdout();
                for report in &reports {
                    writeln!(out, "{report}").map_err(|e| Error::Other(e.to_string()))?;
                }
                match reports.iter().filter(|r| !r.errors.is_empty()).count() {
                    0 => Ok(ExitCode::SUCCESS),
                    n => Err(Error::Other(format!("maintenance of {n} of {} tables failed", reports.len()))),
                }
            }
            Command::Watermark { file, json } => {
                crate::telemetry::init_logs_at("error").map_err(Error::Variable)?;
                let said = watermark::watermark(&load(&file.file)?, json).await?;
                writeln!(std::io::stdout(), "{}", said.trim_end()).map_err(|e| Error::Other(e.to_string()))?;
                Ok(ExitCode::SUCCESS)
            }
            // Required, so that a later source can be told apart by its name.
            Command::Recover { from_table: _, drop_open_windows, file } => {
                crate::telemetry::init_logs_at("error").map_err(Error::Variable)?;
                let rebuilt = crate::query::rebuild(&load(&file.file)?, drop_open_windows).await?;
                writeln!(std::io::stdout(), "{rebuilt}").map_err(|e| Error::Other(e.to_string()))?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Demo(options) => {
                crate::telemetry::init_logs_at("warn").map_err(Error::Variable)?;
                Ok(demo::demo(&options).await?)
            }
            Command::Dlq(command) => {
                crate::telemetry::init_logs_at("warn").map_err(Error::Variable)?;
                dlq::dlq(command).await?;
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

fn load(file: &Path) -> Result<Config, Error> {
    // A variable that is not UTF-8 cannot be one of Floe's.
    let env: BTreeMap<String, String> =
        std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))).collect();
    crate::config::load(file, &env).map_err(Error::Config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments() {
        for (line, ok) in [
            ("floe run pipeline.toml", true),
            ("floe check pipeline.toml", true),
            ("floe resume pipeline.toml", true),
            ("floe state pipeline.toml", true),
            ("floe plan pipeline.toml --json --apply", true),
            ("floe maintain pipeline.toml --dry-run", true),
            ("floe watermark pipeline.toml --json", true),
            ("floe demo --seconds 3", true),
            ("floe run a b", false),
            ("floe recover --from-table pipeline.toml", true),
            ("floe recover --from-table --drop-open-windows pipeline.toml", true),
            ("floe recover pipeline.toml", false),
            (
                "floe dlq list pipeline.toml --reason empty --reason wrong_type --since 2026-03-01 --by hour --json",
                true,
            ),
            ("floe dlq show pipeline.toml --limit 3", true),
            ("floe dlq retry pipeline.toml --dry-run", true),
            ("floe dlq retry pipeline.toml --reason whatever", false),
            ("floe dlq", false),
            ("floe", false),
        ] {
            assert_eq!(Cli::try_parse_from(line.split(' ')).is_ok(), ok, "{line}");
        }
    }

    #[test]
    fn a_wrong_configuration_ends_with_2_and_a_failed_probe_with_1() {
        let error = load(Path::new("/does/not/exist.toml")).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("/does/not/exist.toml: cannot read the configuration: "), "{error}");
        assert_eq!(Error::Check { failed: 1, probes: 4 }.exit_code(), 1);
    }
}
