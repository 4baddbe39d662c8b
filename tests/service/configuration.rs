//! The configuration file: defaults, overrides, and what is said about mistakes.

use std::path::Path;

use blockyard::config::{Config, Environment};

fn parse(toml: &str) -> Result<Config, String> {
    parse_with(toml, &[])
}

fn parse_with(toml: &str, variables: &[(&str, &str)]) -> Result<Config, String> {
    let environment: Environment = variables.iter().map(|(name, value)| (name.into(), value.into())).collect();
    Config::from_toml(toml, Path::new("test.toml"), &environment).map_err(|error| error.to_string())
}

#[test]
fn empty_file_gives_the_defaults_and_one_node() {
    let config = parse("").unwrap();
    assert_eq!(config.server.bind.to_string(), "127.0.0.1:8082");
    assert_eq!(config.server.callbacks_bind, None);
    assert_eq!(config.database_file(), Path::new("/var/lib/blockyard/blockyard.db"));
    assert_eq!(config.token_file(), Path::new("/var/lib/blockyard/token"));
    assert_eq!(config.nodes["default"].url, "http://127.0.0.1:9081");
    assert_eq!(config.port_range(&config.nodes["default"]).to_string(), "10100-10200");
    assert_eq!(config.jobs.answer_within_s, 10);
}

#[test]
fn unknown_keys_and_sections_name_the_nearest_known_one() {
    let rows = [
        ("[server]\nbnid = \"x\"", "unknown key `server.bnid`, did you mean `server.bind`?"),
        ("[sever]\nbind = \"x\"", "unknown key `sever`, did you mean `server`?"),
        ("[jobs]\nmax_runing = 3", "unknown key `jobs.max_runing`, did you mean `jobs.max_running`?"),
        ("[server]\ntoken_file = \"x\"", "unknown key `server.token_file`, did you mean `auth.token_file`?"),
        ("[nodes.far]\nurls = \"x\"", "unknown key `nodes.far.urls`, did you mean `nodes.far.url`?"),
        (
            "[credentials.a]\npassword = \"x\"",
            "unknown key `credentials.a.password`, did you mean `credentials.a.password_file`?",
        ),
        ("[storage]\ncluster_size = 1", "unknown key `storage.cluster_size`, did you mean `storage.cluster_bytes`?"),
    ];
    for (toml, message) in rows {
        assert_eq!(parse(toml).unwrap_err(), format!("{message} (in test.toml)"));
    }
}

#[test]
fn values_of_the_wrong_type_name_their_key() {
    let rows = [
        ("[server]\nbind = 8082", "`server.bind`"),
        ("[server]\nbind = \"localhost\"", "`server.bind`"),
        ("server = 7", "`server`"),
        ("[server]\nlog_format = \"xml\"", "`server.log_format`"),
        ("[auth]\nmode = \"none\"", "`auth.mode`"),
        ("[auth]\ncallback_peers = [\"x\"]", "`auth.callback_peers"),
        ("[nbd]\nport_range = \"5-4\"", "`nbd.port_range`"),
        ("[nbd]\nport_range = 10100", "`nbd.port_range`"),
        ("[jobs]\nidle_s = -1", "`jobs.idle_s`"),
        ("[nodes]\nfar = 1", "`nodes.far`"),
        ("[credentials.a]\nusername = \"x\"", "`credentials.a`"),
    ];
    for (toml, key) in rows {
        let message = parse(toml).unwrap_err();
        assert!(message.starts_with(key), "{toml}: {message}");
    }
    let message = parse("[server\nbind = 1").unwrap_err();
    assert!(message.starts_with("test.toml is not valid TOML"), "{message}");
}

#[test]
fn values_that_break_a_rule_name_the_rule() {
    let credential = "vcenter_host = \"v\"\nusername = \"\"\npassword_file = \"p\"";
    let tls = "[nbd]\ntls = \"on\"\ncert_file = \"c\"\nkey_file = \"k\"\n";
    let rows = [
        ("[server]\nbind = \"0.0.0.0:8082\"", "`server.bind` must be a loopback address"),
        ("[server]\nbind = \"[::]:8082\"", "`server.bind` must be a loopback address"),
        ("[server]\ncallbacks_bind = \"192.168.1.1:8083\"", "`server.callbacks_bind` must be a loopback address"),
        ("[nbd]\nbind = \"0.0.0.0\"", "`nbd.bind` must be a loopback address"),
        (
            "[auth]\nmode = \"off\"\n[server]\nbind = \"0.0.0.0:1\"",
            "`auth.mode` may be \"off\" only while every bind address is loopback",
        ),
        ("[server]\ncallbacks_bind = \"127.0.0.1:8082\"", "`server.callbacks_bind` must differ"),
        ("[server]\nbody_limit_bytes = 1", "`server.body_limit_bytes` must be"),
        ("[server]\nlog = \"blockyard=loud\"", "`server.log` is no log filter"),
        ("[server]\nstate_dir = \"\"", "`server.state_dir` must name"),
        ("[database]\nurl = \"postgres://x\"", "`database.url` must be empty or start with sqlite:"),
        ("[nbd]\nport_range = \"8000-8100\"", "`nbd.port_range` contains port 8082"),
        ("[nodes.a]\nport_range = \"8082-8083\"", "`nodes.a.port_range` contains port 8082"),
        ("[nbd]\nadvertise_host = \"a,b\"", "`nbd.advertise_host` must be"),
        ("[nbd]\nadvertise_port_offset = 60000", "`nbd.advertise_port_offset` moves port"),
        ("[nbd]\nmax_connections_per_export = 1", "`nbd.max_connections_per_export` must be"),
        ("[nbd]\nhandshake_timeout_s = 0", "`nbd.handshake_timeout_s` must be"),
        ("[nbd]\nmemory_budget_bytes = 1", "`nbd.memory_budget_bytes` must be"),
        ("[nbd]\ntls = \"on\"", "`nbd.cert_file` must name a file"),
        ("[nbd]\ntls = \"required\"\ncert_file = \"c\"", "`nbd.key_file` must name a file"),
        ("[nbd]\ncert_file = \"c\"", "`nbd.cert_file` is of no use while nbd.tls is \"off\""),
        ("[nbd]\nclient_ca_file = \"c\"", "`nbd.client_ca_file` is of no use while"),
        (&format!("{tls}client_ca_file = \"c\""), "`nbd.client_ca_file` keeps nobody out unless"),
        (&format!("{tls}allow_subjects = [\"CN=a\"]"), "`nbd.allow_subjects` needs nbd.client_ca_file"),
        (
            &format!("{}client_ca_file = \"a\"\nallow_subjects = [\"CN=a\", \"/CN=b\"]", tls.replace("on", "required")),
            "`nbd.allow_subjects` is no list of subjects: \"/CN=b\" is no subject such as",
        ),
        (
            &format!("{}[auth]\nmode = \"off\"\n[restore]\nbind = \"0.0.0.0\"", tls.replace("on", "required")),
            "`auth.mode` may be \"off\" only while every bind address is loopback; restore.bind is 0.0.0.0",
        ),
        (&format!("{tls}bind = \"0.0.0.0\""), "`nbd.bind` must be a loopback address, not 0.0.0.0, unless nbd.tls is"),
        (
            &format!("{}bind = \"0.0.0.0\"\n[auth]\nmode = \"off\"", tls.replace("on", "required")),
            "`auth.mode` may be \"off\" only while every bind address is loopback; nbd.bind is 0.0.0.0",
        ),
        ("[jobs]\nidle_s = 0", "`jobs.idle_s` must be"),
        ("[jobs]\nmax_running = 0", "`jobs.max_running` must be"),
        ("[storage]\ncluster_bytes = 1000", "`storage.cluster_bytes` must be"),
        ("[storage]\ncluster_bytes = 4194304", "`storage.cluster_bytes` must be"),
        ("[storage]\nfull_estimate_ratio = 0.0", "`storage.full_estimate_ratio` must be"),
        ("[storage]\nfull_estimate_ratio = nan", "`storage.full_estimate_ratio` must be"),
        ("[nodes.a]\nurl = \"https://x\"", "`nodes.a.url` must start with http://"),
        ("[nodes.a]\nurl = \"http://u:p@x\"", "`nodes.a.url` must hold no login"),
        ("[nodes.a]\nurl = \"http://x/\"", "`nodes.a.url` must not end with a slash"),
        ("[nodes.a]\n[nodes.b]", "`nodes.b.port_range` 10100-10200 overlaps that of node a"),
        ("[restore]\nport_range = \"10200-10299\"", "`restore.port_range` 10200-10299 overlaps nbd.port_range"),
        (
            "[nodes.a]\nport_range = \"10390-10395\"",
            "`restore.port_range` 10300-10399 overlaps nodes.a.port_range, which is 10390-10395",
        ),
        ("[server]\nbind = \"127.0.0.1:10300\"", "`restore.port_range` contains port 10300, on which the API listens"),
        ("[restore]\nbind = \"0.0.0.0\"", "`restore.bind` must be a loopback address, not 0.0.0.0, unless nbd.tls is"),
        ("[restore]\nttl_s = 0", "`restore.ttl_s` must be"),
        ("[restore]\noverlay_limit_bytes = 1000", "`restore.overlay_limit_bytes` must be"),
        ("[nodes.a]\nconnect_timeout_s = 0", "`nodes.a.connect_timeout_s` must be"),
        ("[webhooks.a]\nurl = \"https://x\"\nsecret_file = \"s\"", "`webhooks.a.url` must start with http://"),
        ("[webhooks.a]\nurl = \"http://u:p@x\"\nsecret_file = \"s\"", "`webhooks.a.url` must hold no login"),
        ("[webhooks.a]\nurl = \"http://x\"\nsecret_file = \"\"", "`webhooks.a.secret_file` must not be empty"),
        (
            "[webhooks.a]\nurl = \"http://x\"\nsecret_file = \"s\"\nevents = [\"disk.progress\"]",
            "`webhooks.a.events` holds \"disk.progress\", which is none of job.state",
        ),
        ("[observability]\nevents_keep_days = 36501", "`observability.events_keep_days` must be"),
        (&format!("[credentials.a]\n{credential}"), "`credentials.a.username` must not be empty"),
    ];
    for (toml, message) in rows {
        let found = parse(toml).unwrap_err();
        assert!(found.starts_with(message), "{toml}: {found}");
    }
}

#[test]
fn listeners_beyond_loopback_are_for_those_who_encrypt() {
    let toml =
        "[nbd]\ntls = \"required\"\ncert_file = \"c\"\nkey_file = \"k\"\nclient_ca_file = \"a\"\nbind = \"0.0.0.0\"";
    // Subjects have commas, so that a list of them is written with semicolons.
    let variables = [("BLOCKYARD__NBD__ALLOW_SUBJECTS", "CN=a,O=x; CN=b,O=x")];
    let config = parse_with(toml, &variables).unwrap();
    assert_eq!(config.nbd.allow_subjects, ["CN=a,O=x", "CN=b,O=x"]);
    assert_eq!(config.nbd.target(2000, 10100, "a-disk0"), "2000:nbds://127.0.0.1:10100/a-disk0");
    let optional =
        toml.replace("required", "on").replace("0.0.0.0", "127.0.0.1").replace("client_ca_file = \"a\"\n", "");
    let optional = parse(&optional).unwrap();
    assert_eq!(optional.nbd.target(2000, 10100, "a-disk0"), "2000:nbd://127.0.0.1:10100/a-disk0");
    let both = parse_with(&format!("{toml}\n[restore]\nbind = \"0.0.0.0\""), &variables).unwrap();
    assert!(!both.restore.bind.is_loopback());
    let outside = parse(&toml.replace("[nbd]", "[server]\nbind = \"0.0.0.0:1\"\n[nbd]")).unwrap_err();
    assert!(outside.starts_with("`server.bind` must be a loopback address"), "{outside}");
}

#[test]
fn an_error_names_the_key_its_value_and_the_place_of_it() {
    let variable = [("BLOCKYARD__SERVER__BIND", "localhost:2")];
    let no_address = "this is no IP address with a port, such as 127.0.0.1:8082";
    let rows = [
        ("[server]\nbind = \"localhost:1\"", &[][..], format!("`server.bind` = \"localhost:1\": {no_address} (in test.toml)")),
        (
            "[server]\nbind = \"127.0.0.1:1\"",
            &variable,
            format!("`server.bind` = \"localhost:2\": {no_address} (in the environment variable BLOCKYARD__SERVER__BIND)"),
        ),
        ("[jobs]\nidle_s = 0", &[], "`jobs.idle_s` must be 1 to 2592000, not 0 (in test.toml)".to_owned()),
        (
            "[server]\nbind = \"127.0.0.1:10100\"",
            &[],
            "`nbd.port_range` contains port 10100, on which the API listens (not set in test.toml)".to_owned(),
        ),
        ("", &[("BLOCKYARD__SERVER__BNID", "x")], 
            "unknown key `server.bnid`, did you mean `server.bind`? (in the environment variable BLOCKYARD__SERVER__BNID)".to_owned()),
    ];
    for (toml, variables, message) in rows {
        assert_eq!(parse_with(toml, variables).unwrap_err(), message);
    }
}

#[test]
fn environment_overrides_the_file_key_by_key() {
    let toml = "[server]\nbind = \"127.0.0.1:1\"\ndrain_s = 5\n[nodes.far]\nurl = \"http://far\"\nport_range = \"7-9\"";
    let variables = [
        ("BLOCKYARD__SERVER__BIND", "[::1]:2"),
        ("BLOCKYARD__AUTH__CALLBACK_PEERS", "10.0.0.0/8, 192.168.1.7"),
        ("BLOCKYARD__NBD__LIST_EXPORTS", "true"),
        ("BLOCKYARD__STORAGE__FULL_ESTIMATE_RATIO", "0.25"),
        ("BLOCKYARD__NODES__FAR__MAX_RUNNING", "3"),
        ("BLOCKYARD__NODES__NEAR__URL", "http://near"),
        ("BLOCKYARD_URL", "http://ignored"),
        ("PATH", "/bin"),
    ];
    let config = parse_with(toml, &variables).unwrap();
    assert_eq!(config.server.bind.to_string(), "[::1]:2");
    assert_eq!(config.server.drain_s, 5);
    let peers: Vec<String> = config.auth.callback_peers.iter().map(ToString::to_string).collect();
    assert_eq!(peers, ["10.0.0.0/8", "192.168.1.7/32"]);
    assert!(config.nbd.list_exports);
    assert!((config.storage.full_estimate_ratio - 0.25).abs() < f64::EPSILON);
    assert_eq!(config.nodes["far"].max_running, 3);
    assert_eq!(config.nodes["near"].url, "http://near");

    let rows = [
        ("BLOCKYARD__SERVER__BNID", "x", "unknown key `server.bnid`, did you mean `server.bind`?"),
        ("BLOCKYARD__SERVER", "x", "environment variable BLOCKYARD__SERVER overrides nothing"),
        ("BLOCKYARD__SERVER__BIND__X", "x", "environment variable BLOCKYARD__SERVER__BIND__X overrides nothing"),
        ("BLOCKYARD__", "x", "environment variable BLOCKYARD__ overrides nothing"),
        ("BLOCKYARD__JOBS__IDLE_S", "soon", "`jobs.idle_s` = \"soon\": this is no whole number"),
        ("BLOCKYARD__NBD__LIST_EXPORTS", "yes", "`nbd.list_exports` = \"yes\": this is no true or false"),
    ];
    for (name, value, message) in rows {
        let found = parse_with("", &[(name, value)]).unwrap_err();
        assert!(found.starts_with(message), "{found}");
    }
}

#[test]
fn file_is_taken_from_the_command_line_then_the_environment_then_the_default_place() {
    let folder = tempfile::tempdir().unwrap();
    let (named, in_environment) = (folder.path().join("a.toml"), folder.path().join("b.toml"));
    std::fs::write(&named, "[server]\ndrain_s = 1").unwrap();
    std::fs::write(&in_environment, "[server]\ndrain_s = 2").unwrap();
    let environment = Environment::from_iter([("BLOCKYARD_CONFIG".into(), in_environment.into_os_string())]);
    assert_eq!(Config::load(Some(&named), &environment).unwrap().server.drain_s, 1);
    assert_eq!(Config::load(None, &environment).unwrap().server.drain_s, 2);
    let missing = Config::load(Some(&folder.path().join("c.toml")), &environment).unwrap_err().to_string();
    assert!(missing.contains("c.toml cannot be read"), "{missing}");
}

#[test]
fn every_key_is_documented_with_its_default() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    let text = std::fs::read_to_string(path).unwrap();
    let documented: Vec<(String, String)> = text
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` | "))
        .map(|(key, rest)| (key.to_owned(), rest.split(" | ").next().unwrap_or_default().to_owned()))
        .collect();
    let wanted: Vec<(String, String)> = Config::reference()
        .into_iter()
        .map(|(key, default)| {
            let optional = [".events", ".datacenter"].iter().any(|name| key.ends_with(name));
            let required = !optional && ["credentials.", "webhooks."].iter().any(|section| key.starts_with(section));
            (key, if required { "required".to_owned() } else { format!("`{default}`") })
        })
        .collect();
    for row in &wanted {
        assert!(documented.contains(row), "docs/configuration.md lacks {row:?}");
    }
    for row in &documented {
        assert!(wanted.contains(row), "docs/configuration.md has {row:?}, which is no key");
    }
}
