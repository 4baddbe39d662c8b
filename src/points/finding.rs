//! What a verification finds, and what follows from it for the point.

use std::io;

use blockyard_qcow2 as qcow2;
use serde::Serialize;
use utoipa::ToSchema;

/// What a finding means for the point whose file it is about, from the least to the worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// It was set right, or does no harm.
    Warning,
    /// What was committed can no longer be proven.
    Suspect,
    /// It could not be read now; nothing is concluded from that.
    Failed,
    /// Its files are not there.
    Missing,
    /// Its files are not what was committed.
    Corrupt,
}

/// One thing that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Finding {
    /// What it means.
    pub severity: Severity,
    /// What kind of thing it is.
    #[schema(example = "digest_mismatch")]
    pub code: &'static str,
    /// The file in the point's folder, where it is about one.
    pub file: Option<String>,
    /// The same for people.
    pub detail: String,
}

impl Finding {
    /// About one file.
    pub fn of_file(severity: Severity, code: &'static str, file: &str, detail: impl Into<String>) -> Self {
        Self { severity, code, file: Some(file.to_owned()), detail: detail.into() }
    }

    /// About the whole point.
    pub fn of_point(severity: Severity, code: &'static str, detail: impl Into<String>) -> Self {
        Self { severity, code, file: None, detail: detail.into() }
    }

    /// A file that could not be read: gone, or in the way of an error that says nothing about what was committed.
    pub fn unreadable(file: &str, error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::of_file(Severity::Missing, "file_missing", file, "the file is not there"),
            io::ErrorKind::InvalidInput => Self::of_file(Severity::Corrupt, "not_a_file", file, error.to_string()),
            _ => Self::of_file(Severity::Failed, "unreadable", file, error.to_string()),
        }
    }

    /// An image that the engine did not like.
    pub fn of_image(file: &str, error: &qcow2::Error) -> Self {
        match error {
            qcow2::Error::Unreadable { source, .. } => Self::of_image(file, source),
            // The file ended before its tables do.
            qcow2::Error::Io { source, .. } if source.kind() == io::ErrorKind::UnexpectedEof => {
                Self::of_file(Severity::Corrupt, "structure", file, error.to_string())
            }
            qcow2::Error::Open { source, .. } | qcow2::Error::Io { source, .. } => Self::unreadable(file, source),
            qcow2::Error::NotQcow2 | qcow2::Error::Corrupt { .. } | qcow2::Error::Backing { .. } => {
                Self::of_file(Severity::Corrupt, "structure", file, error.to_string())
            }
            // A newer version may have written it, or a bit of its header is not what it was.
            qcow2::Error::Unsupported { .. } => Self::of_file(Severity::Suspect, "structure", file, error.to_string()),
            _ => Self::of_file(Severity::Failed, "unreadable", file, error.to_string()),
        }
    }

    /// As a reason for a point's trust.
    pub fn reason(&self) -> String {
        match &self.file {
            Some(file) => format!("{}: {file}: {}", self.code, self.detail),
            None => format!("{}: {}", self.code, self.detail),
        }
    }
}

/// The worst of them.
pub fn worst(findings: &[Finding]) -> Option<&Finding> {
    // The first of several that are as bad.
    findings.iter().rev().max_by_key(|finding| finding.severity)
}
