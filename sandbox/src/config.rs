//! The configuration: `/etc/bulkhead/config.toml`, then the files of `config.d` beside it in the order of their names. A later
//! file wins, key by key; a key that is not known is an error.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::{Table, Value};

use crate::artifacts::{LIBEXEC_VARIABLE, SHARE_VARIABLE};
use crate::cgroup::SandboxCgroup;
use crate::size::Size;
use crate::sizing::ANNOTATIONS;

/// Where the configuration is looked for, unless [`CONFIG_VARIABLE`] names another file.
pub const CONFIG_FILE: &str = "/etc/bulkhead/config.toml";
/// Environment variable that names the configuration's file.
pub const CONFIG_VARIABLE: &str = "BULKHEAD_CONFIG";

/// What can be configured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where things are.
    pub paths: Paths,
    /// Whom VMMs run as.
    pub uids: Uids,
    /// What a sandbox gets when nothing is asked.
    pub defaults: Defaults,
    /// Where on the host sandboxes are accounted for.
    pub cgroups: Cgroups,
    /// What a container may ask for itself.
    pub annotations: Annotations,
}

/// Where things are.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Paths {
    /// Directory of `bulkhead-vmm`; by default `../libexec/bulkhead` seen from the running executable's.
    pub libexec: Option<PathBuf>,
    /// Directory of `vmlinux` and `guest.erofs`; by default `../share/bulkhead` seen from the running executable's.
    pub share: Option<PathBuf>,
    /// KVM's device.
    pub kvm: PathBuf,
}

impl Default for Paths {
    fn default() -> Self {
        Self { libexec: None, share: None, kvm: "/dev/kvm".into() }
    }
}

/// Whom VMMs run as: each gets a uid, and a gid of the same number, that no other VMM has at that time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Uids {
    /// The first uid. The default lies where systemd's list of uid ranges has nothing.
    pub first: u32,
    /// How many there are, and so how many sandboxes at a time.
    pub count: u32,
}

impl Default for Uids {
    fn default() -> Self {
        Self { first: 1_900_000_000, count: 65_536 }
    }
}

/// What a sandbox gets when nothing is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Defaults {
    /// Memory of the virtual machine.
    pub memory: Size,
    /// CPUs.
    pub cpus: u8,
    /// What a container of containerd's erofs snapshotter can write.
    pub storage: Size,
}

impl Default for Defaults {
    fn default() -> Self {
        Self { memory: Size(1 << 30), cpus: 2, storage: Size(16 << 30) }
    }
}

/// Where on the host sandboxes are accounted for whose configuration does not say it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cgroups {
    /// The cgroup in which each of them gets one of its own. Empty: they stay in the cgroup of their launcher.
    pub parent: String,
}

impl Default for Cgroups {
    fn default() -> Self {
        Self { parent: "bulkhead".into() }
    }
}

/// What a container may ask for itself, by annotations of its configuration, whose author may be anybody.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Annotations {
    /// The names of those that count, of [`ANNOTATIONS`](crate::sizing::ANNOTATIONS). Any other of ours is an error.
    pub allow: Vec<String>,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file that is there cannot be read.
    #[error("cannot read {0}")]
    Read(PathBuf, #[source] io::Error),
    /// A file's content is not accepted.
    #[error("{0} is not valid: correct or remove what it names")]
    Parse(PathBuf, #[source] Box<toml::de::Error>),
    /// An annotation that does not exist.
    #[error("annotations.allow names {0:?}: there are {list}", list = ANNOTATIONS.join(" and "))]
    Annotation(String),
    /// A cgroup that is none.
    #[error("cgroups.parent is {0:?}: give a path below /sys/fs/cgroup, without \"..\", or \"\"")]
    Parent(String),
    /// A uid that would be that of a user, or past the end of all uids.
    #[error("uids {first} to {first}+{count}: VMMs run as uids above 65535 and below 4294967294")]
    Uids {
        /// The first.
        first: u32,
        /// How many.
        count: u32,
    },
}

impl Config {
    /// Reads the configuration of this host.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_environment() -> Result<Self, ConfigError> {
        let file = std::env::var_os(CONFIG_VARIABLE).map_or_else(|| CONFIG_FILE.into(), PathBuf::from);
        Self::load(&file)
    }

    /// Reads `file` and the `*.toml` in the directory `config.d` beside it. None of them needs to exist.
    ///
    /// # Errors
    /// [`ConfigError`] for a file that cannot be read, is not TOML or holds an unknown key or a value of the wrong type.
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        Self::from_layers(file, &layers(file)?)
    }

    fn from_layers(file: &Path, layers: &[(PathBuf, Table)]) -> Result<Self, ConfigError> {
        let mut merged = Table::new();
        for (_, layer) in layers {
            merge(&mut merged, layer.clone());
        }
        let config: Self =
            Value::Table(merged).try_into().map_err(|e| ConfigError::Parse(file.to_owned(), Box::new(e)))?;
        let Uids { first, count } = config.uids;
        let last = first.checked_add(count).filter(|last| *last < u32::MAX);
        if first <= 0xffff || count == 0 || last.is_none() {
            return Err(ConfigError::Uids { first, count });
        }
        let parent = &config.cgroups.parent;
        if !parent.is_empty() && SandboxCgroup::of(&format!("{parent}/id")).is_err() {
            return Err(ConfigError::Parent(parent.clone()));
        }
        if let Some(unknown) =
            config.annotations.allow.iter().find(|name| !ANNOTATIONS.contains(&name.as_str()))
        {
            return Err(ConfigError::Annotation(unknown.clone()));
        }
        Ok(config)
    }

    /// Every value that holds, with where it came from, in the order of the installed file.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn explain(file: &Path) -> Result<Vec<Setting>, ConfigError> {
        let layers = layers(file)?;
        let config = Self::from_layers(file, &layers)?;
        let path = |path: &Option<PathBuf>, default: &str| {
            path.as_ref().map_or_else(|| default.to_owned(), |path| path.display().to_string())
        };
        let variable = |name: &'static str| std::env::var(name).ok().map(|value| (name, value));
        let settings = [
            (
                "paths.libexec",
                path(&config.paths.libexec, "../libexec/bulkhead of the executable's directory"),
                variable(LIBEXEC_VARIABLE),
            ),
            (
                "paths.share",
                path(&config.paths.share, "../share/bulkhead of the executable's directory"),
                variable(SHARE_VARIABLE),
            ),
            ("paths.kvm", config.paths.kvm.display().to_string(), None),
            ("uids.first", config.uids.first.to_string(), None),
            ("uids.count", config.uids.count.to_string(), None),
            ("defaults.memory", config.defaults.memory.to_string(), None),
            ("defaults.cpus", config.defaults.cpus.to_string(), None),
            ("defaults.storage", config.defaults.storage.to_string(), None),
            ("cgroups.parent", format!("{:?}", config.cgroups.parent), None),
            ("annotations.allow", format!("[{}]", config.annotations.allow.join(", ")), None),
        ];
        let explain = |(key, value, variable): (&'static str, String, Option<(&'static str, String)>)| {
            if let Some((name, value)) = variable {
                return Setting { key, value, origin: Origin::Environment(name) };
            }
            let found = layers.iter().rev().find(|(_, layer)| contains(layer, key));
            let origin = found.map_or(Origin::Default, |(path, _)| Origin::File(path.clone()));
            Setting { key, value, origin }
        };
        Ok(settings.into_iter().map(explain).collect())
    }
}

/// A value of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Section and key, with a dot between them.
    pub key: &'static str,
    /// The value that holds.
    pub value: String,
    /// Where it came from.
    pub origin: Origin,
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nobody said anything.
    Default,
    /// The last file that has it.
    File(PathBuf),
    /// An environment variable, which comes before all files.
    Environment(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Environment(name) => write!(f, "the environment's {name}"),
        }
    }
}

/// The files that are there, each valid for itself, in the order in which they are read.
fn layers(file: &Path) -> Result<Vec<(PathBuf, Table)>, ConfigError> {
    let mut layers = Vec::new();
    for path in std::iter::once(file.to_owned()).chain(drop_ins(file)?) {
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(ConfigError::Read(path, e)),
        };
        let parse_error = |e| ConfigError::Parse(path.clone(), Box::new(e));
        toml::from_str::<Config>(&text).map_err(parse_error)?;
        let table = toml::from_str(&text).map_err(parse_error)?;
        layers.push((path, table));
    }
    Ok(layers)
}

/// True when a file has a value of this section and key.
fn contains(table: &Table, key: &str) -> bool {
    let Some((section, name)) = key.split_once('.') else { return table.contains_key(key) };
    table.get(section).and_then(Value::as_table).is_some_and(|section| section.contains_key(name))
}

fn drop_ins(file: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let directory = file.with_file_name("config.d");
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(ConfigError::Read(directory, e)),
    };
    let paths: io::Result<Vec<PathBuf>> = entries.map(|entry| Ok(entry?.path())).collect();
    let mut paths = paths.map_err(|e| ConfigError::Read(directory, e))?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    Ok(paths)
}

fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => merge(old, new),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(main: Option<&str>, drop_ins: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        if let Some(text) = main {
            fs::write(&file, text).unwrap();
        }
        fs::create_dir(dir.path().join("config.d")).unwrap();
        for (name, text) in drop_ins {
            fs::write(dir.path().join("config.d").join(name), text).unwrap();
        }
        Config::load(&file)
    }

    #[test]
    fn the_file_that_is_installed_says_nothing_but_the_defaults() {
        let installed = include_str!("../config.toml");
        assert_eq!(load(Some(installed), &[]).unwrap(), Config::default());
        let is_setting = |line: &&str| line.starts_with('#') && !line.starts_with("# ");
        let settings = installed.lines().filter(is_setting).count();
        let uncommented: String = installed
            .lines()
            .map(|line| if is_setting(&line) { &line[1..] } else { line })
            .collect::<Vec<_>>()
            .join("\n");
        assert_eq!(settings, 10);
        let said = load(Some(&uncommented), &[]).unwrap();
        let paths = Paths {
            libexec: said.paths.libexec.clone(),
            share: said.paths.share.clone(),
            ..Paths::default()
        };
        assert!(paths.libexec.is_some() && paths.share.is_some());
        assert_eq!(said, Config { paths, ..Config::default() });
    }

    #[test]
    fn without_files_the_defaults_hold() {
        let config = load(None, &[]).unwrap();
        assert_eq!(config, Config::default());
        assert_eq!((config.defaults.memory, config.defaults.cpus), (Size(1 << 30), 2));
    }

    #[test]
    fn a_drop_in_wins_key_by_key_and_later_names_win() {
        let main = "[defaults]\nmemory = \"512M\"\ncpus = 1\n";
        let drop_ins = [
            ("20.toml", "[defaults]\ncpus = 4"),
            ("10.toml", "[defaults]\ncpus = 3"),
            ("30.toml.bak", "nonsense"),
        ];
        let config = load(Some(main), &drop_ins).unwrap();
        assert_eq!((config.defaults.memory, config.defaults.cpus), (Size(512 << 20), 4));
    }

    #[test]
    fn every_value_is_explained_by_the_last_file_that_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let (file, drop_in) = (dir.path().join("config.toml"), dir.path().join("config.d/10.toml"));
        fs::write(&file, "[defaults]\nmemory = \"512M\"\ncpus = 1\n").unwrap();
        fs::create_dir(dir.path().join("config.d")).unwrap();
        fs::write(&drop_in, "[defaults]\ncpus = 3\n").unwrap();
        let explained = Config::explain(&file).unwrap();
        let find = |key: &str| {
            let setting = explained.iter().find(|setting| setting.key == key).unwrap();
            (setting.value.clone(), setting.origin.clone())
        };
        assert_eq!(find("defaults.memory"), ("512 MiB".into(), Origin::File(file)));
        assert_eq!(find("defaults.cpus"), ("3".into(), Origin::File(drop_in)));
        assert_eq!(find("paths.kvm"), ("/dev/kvm".into(), Origin::Default));
        // Whoever adds a key to the installed file explains it, too.
        let installed = include_str!("../config.toml");
        let settings = installed.lines().filter(|line| line.starts_with('#') && !line.starts_with("# "));
        assert_eq!(settings.count(), explained.len());
    }

    #[test]
    fn an_annotation_that_does_not_exist_cannot_be_allowed() {
        let error = load(Some("[annotations]\nallow = [\"io.bulkhead.vm.kernel\"]"), &[]).unwrap_err();
        assert!(error.to_string().contains("io.bulkhead.vm.memory"), "{error}");
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_file_and_key() {
        let error = load(None, &[("a.toml", "[defaults]\nmemroy = \"1G\"")]).unwrap_err();
        assert!(error.to_string().contains("a.toml"), "{error}");
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("memroy"), "{source}");
    }

    #[test]
    fn a_parent_of_cgroups_is_a_path_below_the_root_of_all_or_nothing() {
        let with = |parent: &str| load(Some(&format!("[cgroups]\nparent = {parent:?}")), &[]);
        for good in ["", "bulkhead", "/machines.slice/bulkhead"] {
            assert_eq!(with(good).unwrap().cgroups.parent, good);
        }
        for bad in ["../etc", "a/../.."] {
            let error = with(bad).unwrap_err().to_string();
            assert!(error.contains("cgroups.parent") && error.contains(bad), "{error}");
        }
    }

    #[test]
    fn uids_of_users_and_of_nobody_are_refused() {
        assert!(matches!(load(Some("[uids]\nfirst = 1000"), &[]), Err(ConfigError::Uids { .. })));
        assert!(matches!(
            load(Some("[uids]\nfirst = 4294967290\ncount = 10"), &[]),
            Err(ConfigError::Uids { .. })
        ));
    }
}
