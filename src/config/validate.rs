//! The rules that a configuration keeps beyond the types of its values. Checked once, before anything is opened.

use std::net::IpAddr;

use blockyard_nbd::tls::Subject;

use super::load::ConfigError;
use super::{AuthMode, Config, Node, PortRange, TlsMode, Webhook};
use crate::store::events::{KINDS, PROGRESS};

/// Cluster sizes that a qcow2 image can have: `1 << 9` to `1 << 21` bytes.
/// What the engine opens.
const CHAIN_DEPTH: std::ops::RangeInclusive<u32> = 1..=64;
const CLUSTER_BYTES: std::ops::RangeInclusive<u32> = 512..=2 << 20;
/// Half of the budget is for reads, and must hold one reply of the largest size, 64 MiB, besides the 16 MiB that are kept for
/// connections that hold nothing.
const MEMORY_BUDGET_MIN: u64 = 160 << 20;
/// Ten years: a guess; more is a unit mistaken for another.
const SCRUB_DAYS_MAX: u32 = 3650;
/// The backup client opens two connections per export.
const CONNECTIONS_MIN: u32 = 2;
/// An overlay that cannot hold its own tables and a few clusters is of no use to anybody.
const OVERLAY_MIN: u64 = 1 << 20;
/// Longest time that a limit in seconds may name: 30 days. A guess; more is a unit mistaken for milliseconds.
const SECONDS_MAX: u64 = 30 * 86_400;

/// Longest time in days: a hundred years.
const DAYS_MAX: u64 = 36_500;

fn invalid(key: impl Into<String>, rule: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { key: key.into(), rule: rule.into() }
}

impl Config {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        self.validate_binds()?;
        self.validate_server()?;
        self.validate_nbd()?;
        for (name, node) in &self.nodes {
            validate_node(name, node)?;
        }
        self.validate_port_ranges()?;
        self.validate_credentials()?;
        self.validate_jobs()?;
        self.validate_storage()?;
        for (name, webhook) in &self.webhooks {
            validate_webhook(name, webhook)?;
        }
        if self.observability.events_keep_days > DAYS_MAX {
            return Err(invalid("observability.events_keep_days", format!("must be 0 to {DAYS_MAX}")));
        }
        self.validate_restore()
    }

    /// The API is plain HTTP, and exports have no password: both stay on this machine, exports unless they are encrypted.
    fn validate_binds(&self) -> Result<(), ConfigError> {
        let binds = [
            ("server.bind", Some(self.server.bind.ip())),
            ("server.callbacks_bind", self.server.callbacks_bind.map(|address| address.ip())),
            ("nbd.bind", Some(self.nbd.bind)),
            ("restore.bind", Some(self.restore.bind)),
        ];
        let encrypted = self.nbd.tls == TlsMode::Required;
        let is_export = |key: &str| key == "nbd.bind" || key == "restore.bind";
        let outside = binds
            .into_iter()
            .filter(|(key, _)| !(encrypted && self.auth.mode == AuthMode::Token && is_export(key)))
            .find_map(|(key, ip)| Some((key, ip.filter(|ip: &IpAddr| !ip.is_loopback())?)));
        match outside {
            Some((key, ip)) if self.auth.mode == AuthMode::Off => Err(invalid(
                "auth.mode",
                format!("may be \"off\" only while every bind address is loopback; {key} is {ip}"),
            )),
            Some((key, ip)) if is_export(key) => {
                Err(invalid(key, format!("must be a loopback address, not {ip}, unless nbd.tls is \"required\"")))
            }
            Some((key, ip)) => {
                Err(invalid(key, format!("must be a loopback address, not {ip}: put a tunnel or a proxy in front")))
            }
            None => Ok(()),
        }
    }

    fn validate_server(&self) -> Result<(), ConfigError> {
        let server = &self.server;
        if server.callbacks_bind.is_some_and(|address| address == server.bind && address.port() != 0) {
            return Err(invalid("server.callbacks_bind", "must differ from server.bind"));
        }
        if server.state_dir.as_os_str().is_empty() {
            return Err(invalid("server.state_dir", "must name a folder"));
        }
        if server.drain_s > SECONDS_MAX {
            return Err(invalid("server.drain_s", format!("must be 0 to {SECONDS_MAX}, not {}", server.drain_s)));
        }
        if !(1024..=64 << 20).contains(&server.body_limit_bytes) {
            return Err(invalid(
                "server.body_limit_bytes",
                format!("must be 1024 to 67108864, not {}", server.body_limit_bytes),
            ));
        }
        if let Err(error) = server.log.parse::<tracing_subscriber::EnvFilter>() {
            return Err(invalid("server.log", format!("is no log filter: {error}")));
        }
        match &self.database.url {
            Some(url) if !url.starts_with("sqlite:") => {
                Err(invalid("database.url", "must be empty or start with sqlite:, the only database so far"))
            }
            _ => Ok(()),
        }
    }

    fn validate_nbd(&self) -> Result<(), ConfigError> {
        let nbd = &self.nbd;
        let host_characters = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-');
        if nbd.advertise_host.is_empty() || !nbd.advertise_host.chars().all(host_characters) {
            // It goes into a list that the backup client splits at commas and colons.
            return Err(invalid("nbd.advertise_host", "must be a host name or an IPv4 address"));
        }
        for port in [*nbd.port_range.ports().start(), *nbd.port_range.ports().end()] {
            if !(1..=65_535).contains(&(i64::from(port) + i64::from(nbd.advertise_port_offset))) {
                return Err(invalid("nbd.advertise_port_offset", format!("moves port {port} out of 1 to 65535")));
            }
        }
        if !(CONNECTIONS_MIN..=1024).contains(&nbd.max_connections_per_export) {
            return Err(invalid("nbd.max_connections_per_export", format!("must be {CONNECTIONS_MIN} to 1024")));
        }
        if !(1..=3600).contains(&nbd.handshake_timeout_s) {
            return Err(invalid("nbd.handshake_timeout_s", "must be 1 to 3600"));
        }
        if nbd.memory_budget_bytes < MEMORY_BUDGET_MIN {
            return Err(invalid("nbd.memory_budget_bytes", format!("must be at least {MEMORY_BUDGET_MIN}")));
        }
        self.validate_tls()
    }

    fn validate_tls(&self) -> Result<(), ConfigError> {
        let nbd = &self.nbd;
        let files = [
            ("nbd.cert_file", &nbd.cert_file),
            ("nbd.key_file", &nbd.key_file),
            ("nbd.client_ca_file", &nbd.client_ca_file),
        ];
        if nbd.tls == TlsMode::Off {
            // Whoever names certificates believes that they are used.
            if let Some((key, _)) = files.iter().find(|(_, file)| file.is_some()) {
                return Err(invalid(*key, "is of no use while nbd.tls is \"off\""));
            }
        } else if let Some((key, _)) = files.iter().take(2).find(|(_, file)| file.is_none()) {
            return Err(invalid(*key, "must name a file unless nbd.tls is \"off\""));
        }
        if nbd.tls == TlsMode::On && nbd.client_ca_file.is_some() {
            // It would keep out those who encrypt without a certificate, and let in those who do not encrypt.
            return Err(invalid("nbd.client_ca_file", "keeps nobody out unless nbd.tls is \"required\""));
        }
        if !nbd.allow_subjects.is_empty() && nbd.client_ca_file.is_none() {
            return Err(invalid("nbd.allow_subjects", "needs nbd.client_ca_file, without which no client is asked"));
        }
        for subject in &nbd.allow_subjects {
            if let Err(error) = subject.parse::<Subject>() {
                return Err(invalid("nbd.allow_subjects", format!("is no list of subjects: {error}")));
            }
        }
        Ok(())
    }

    fn validate_port_ranges(&self) -> Result<(), ConfigError> {
        let ranges: Vec<(&String, PortRange)> =
            self.nodes.iter().map(|(name, node)| (name, self.port_range(node))).collect();
        for (index, (name, range)) in ranges.iter().enumerate() {
            if let Some((other, _)) = ranges[..index].iter().find(|(_, other)| other.overlaps(*range)) {
                return Err(invalid(
                    format!("nodes.{name}.port_range"),
                    format!("{range} overlaps that of node {other}: each node needs ports of its own"),
                ));
            }
        }
        let own =
            self.nodes.iter().filter_map(|(name, node)| Some((format!("nodes.{name}.port_range"), node.port_range?)));
        let own: Vec<_> = own.chain([("nbd.port_range".to_owned(), self.nbd.port_range)]).collect();
        let restore = self.restore.port_range;
        if let Some((key, range)) = own.iter().find(|(_, range)| range.overlaps(restore)) {
            return Err(invalid(
                "restore.port_range",
                format!("{restore} overlaps {key}, which is {range}: jobs and exports need ports of their own"),
            ));
        }
        for (key, range) in own.into_iter().chain([("restore.port_range".to_owned(), restore)]) {
            let listeners = [Some(self.server.bind), self.server.callbacks_bind].into_iter().flatten();
            if let Some(port) = listeners.map(|address| address.port()).find(|port| range.ports().contains(port)) {
                return Err(invalid(key, format!("contains port {port}, on which the API listens")));
            }
        }
        Ok(())
    }

    fn validate_credentials(&self) -> Result<(), ConfigError> {
        for (name, credential) in &self.credentials {
            let fields = [
                ("vcenter_host", credential.vcenter_host.is_empty()),
                ("username", credential.username.is_empty()),
                ("password_file", credential.password_file.as_os_str().is_empty()),
            ];
            if let Some((key, _)) = fields.iter().find(|(_, empty)| *empty) {
                return Err(invalid(format!("credentials.{name}.{key}"), "must not be empty"));
            }
        }
        Ok(())
    }

    fn validate_jobs(&self) -> Result<(), ConfigError> {
        let jobs = &self.jobs;
        let limits = [
            ("answer_within_s", jobs.answer_within_s),
            ("prepare_s", jobs.prepare_s),
            ("start_grace_s", jobs.start_grace_s),
            ("first_contact_warn_s", jobs.first_contact_warn_s),
            ("first_contact_s", jobs.first_contact_s),
            ("idle_s", jobs.idle_s),
            ("stalled_s", jobs.stalled_s),
            ("reconnect_s", jobs.reconnect_s),
            ("seal_s", jobs.seal_s),
            ("cancel_s", jobs.cancel_s),
            ("idempotency_ttl_s", jobs.idempotency_ttl_s),
        ];
        for (key, seconds) in limits {
            if !(1..=SECONDS_MAX).contains(&seconds) {
                return Err(invalid(format!("jobs.{key}"), format!("must be 1 to {SECONDS_MAX}, not {seconds}")));
            }
        }
        if jobs.max_running == 0 {
            return Err(invalid("jobs.max_running", "must be at least 1"));
        }
        Ok(())
    }

    fn validate_restore(&self) -> Result<(), ConfigError> {
        let restore = &self.restore;
        if !(1..=SECONDS_MAX).contains(&restore.ttl_s) {
            return Err(invalid("restore.ttl_s", format!("must be 1 to {SECONDS_MAX}, not {}", restore.ttl_s)));
        }
        if restore.overlay_limit_bytes < OVERLAY_MIN {
            return Err(invalid("restore.overlay_limit_bytes", format!("must be at least {OVERLAY_MIN}")));
        }
        Ok(())
    }

    fn validate_storage(&self) -> Result<(), ConfigError> {
        let storage = &self.storage;
        if !CLUSTER_BYTES.contains(&storage.cluster_bytes) || !storage.cluster_bytes.is_power_of_two() {
            return Err(invalid("storage.cluster_bytes", "must be a power of two from 512 to 2097152"));
        }
        if !(storage.full_estimate_ratio > 0.0 && storage.full_estimate_ratio <= 1.0) {
            return Err(invalid("storage.full_estimate_ratio", "must be above 0 and at most 1"));
        }
        if !CHAIN_DEPTH.contains(&storage.max_chain_depth) {
            return Err(invalid("storage.max_chain_depth", "must be 1 to 64"));
        }
        if storage.scrub_interval_days > SCRUB_DAYS_MAX {
            return Err(invalid("storage.scrub_interval_days", "must be 0 (never) to 3650"));
        }
        Ok(())
    }
}

fn validate_webhook(name: &str, webhook: &Webhook) -> Result<(), ConfigError> {
    let key = |key: &str| format!("webhooks.{name}.{key}");
    let url = reqwest::Url::parse(&webhook.url).map_err(|error| invalid(key("url"), format!("is no URL: {error}")))?;
    if url.scheme() != "http" || url.host().is_none() {
        return Err(invalid(key("url"), "must start with http:// and name a host: put a proxy in front of https"));
    }
    if !url.username().is_empty() || url.password().is_some() || url.fragment().is_some() {
        return Err(invalid(key("url"), "must hold no login or fragment"));
    }
    if webhook.secret_file.as_os_str().is_empty() {
        return Err(invalid(key("secret_file"), "must not be empty"));
    }
    let stored = || KINDS.into_iter().filter(|kind| *kind != PROGRESS);
    if let Some(kind) = webhook.events.iter().find(|kind| !stored().any(|stored| stored == kind.as_str())) {
        let stored: Vec<_> = stored().collect();
        return Err(invalid(key("events"), format!("holds {kind:?}, which is none of {}", stored.join(", "))));
    }
    Ok(())
}

fn validate_node(name: &str, node: &Node) -> Result<(), ConfigError> {
    let key = |key: &str| format!("nodes.{name}.{key}");
    let url = reqwest::Url::parse(&node.url).map_err(|error| invalid(key("url"), format!("is no URL: {error}")))?;
    if url.scheme() != "http" || url.host().is_none() {
        return Err(invalid(key("url"), "must start with http:// and name a host"));
    }
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        return Err(invalid(key("url"), "must hold no login, query or fragment"));
    }
    if node.url.ends_with('/') {
        return Err(invalid(key("url"), "must not end with a slash"));
    }
    for (name, seconds) in
        [("connect_timeout_s", node.connect_timeout_s), ("request_timeout_s", node.request_timeout_s)]
    {
        if !(1..=3600).contains(&seconds) {
            return Err(invalid(key(name), format!("must be 1 to 3600, not {seconds}")));
        }
    }
    Ok(())
}
