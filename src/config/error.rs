//! What is wrong with a configuration: every mistake with its place, its key, what was found and what is allowed.

use std::fmt;
use std::path::PathBuf;

/// Where a setting came from, or should have come from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// Line 0 means the file as a whole.
    File(PathBuf, usize),
    Variable(String),
    /// The problem says it.
    Unknown,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File(path, 0) => write!(f, "{}", path.display()),
            Place::File(path, line) => write!(f, "{}:{line}", path.display()),
            Place::Variable(name) => write!(f, "${name}"),
            Place::Unknown => Ok(()),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConfigError {
    pub place: Place,
    /// Path of the setting, `source.topics`; empty when the mistake is not about one.
    pub key: String,
    pub problem: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.place != Place::Unknown {
            write!(f, "{}: ", self.place)?;
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        write!(f, "{}", self.problem)
    }
}

/// All mistakes of a configuration, in the order of the file, then of the environment. Never empty.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl ConfigErrors {
    /// For mistakes that name their place themselves.
    pub fn from_messages(messages: Vec<String>) -> ConfigErrors {
        let error = |problem| ConfigError { place: Place::Unknown, key: String::new(), problem };
        ConfigErrors(messages.into_iter().map(error).collect())
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{error}")?;
        }
        Ok(())
    }
}
