//! The configuration of a container that is run from an image, with Docker's defaults for what nobody has said.

use oci_spec::OciSpecError;
use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::{
    Capabilities, Capability, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxDeviceCgroupBuilder,
    LinuxNamespaceBuilder, LinuxNamespaceType, LinuxPidsBuilder, LinuxResourcesBuilder, Mount, PosixRlimit,
    Process, ProcessBuilder, RootBuilder, Spec, SpecBuilder, get_default_maskedpaths, get_default_mounts,
    get_default_readonly_paths,
};

use crate::cli::{ProcessArgs, RunArgs};
use crate::failure::Failure;
use crate::signal;

use super::volume;

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const SIGTERM: u32 = 15;

/// What Docker leaves to a container's root.
const CAPABILITIES: [Capability; 14] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fsetid,
    Capability::Fowner,
    Capability::Mknod,
    Capability::NetRaw,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::SysChroot,
    Capability::Kill,
    Capability::AuditWrite,
];

/// Hidden from containers besides oci-spec's list: what newer Docker hides.
const MORE_MASKED_PATHS: [&str; 2] = ["/proc/interrupts", "/sys/devices/virtual/powercap"];

/// What a container runs when nothing else is said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ImageDefaults {
    entrypoint: Vec<String>,
    command: Vec<String>,
    env: Vec<String>,
    workdir: Option<String>,
    /// As the image names him; empty if it names none.
    pub(crate) user: String,
    stop_signal: Option<String>,
}

impl From<&ImageConfiguration> for ImageDefaults {
    fn from(image: &ImageConfiguration) -> Self {
        let Some(config) = image.config() else { return Self::default() };
        Self {
            entrypoint: config.entrypoint().clone().unwrap_or_default(),
            command: config.cmd().clone().unwrap_or_default(),
            env: config.env().clone().unwrap_or_default(),
            workdir: config.working_dir().clone().filter(|directory| !directory.is_empty()),
            user: config.user().clone().unwrap_or_default(),
            stop_signal: config.stop_signal().clone(),
        }
    }
}

impl ImageDefaults {
    /// The words of the command: the entrypoint with the given arguments, or with the image's own if there are none.
    pub(crate) fn command(&self, given: &[String]) -> Result<Vec<String>, Failure> {
        let arguments = if given.is_empty() { &self.command } else { given };
        let words: Vec<String> = self.entrypoint.iter().chain(arguments).cloned().collect();
        if words.is_empty() {
            return Err(Failure::new("the image says no command to run: give one after it"));
        }
        Ok(words)
    }

    /// The number of the signal that asks the container to end.
    pub(crate) fn stop_signal(&self) -> Result<u32, Failure> {
        match &self.stop_signal {
            Some(name) => signal::parse(name).map_err(|e| e.context("the image's stop signal is unusable")),
            None => Ok(SIGTERM),
        }
    }
}

/// The process that `run` starts.
pub(crate) fn process(
    args: &RunArgs,
    image: &ImageDefaults,
    command: &[String],
    hostname: &str,
) -> Result<Process, Failure> {
    let mut env = vec![DEFAULT_PATH.to_owned(), format!("HOSTNAME={hostname}")];
    if args.process.tty {
        env.push("TERM=xterm".into());
    }
    set_variables(&mut env, image.env.iter().cloned());
    set_variables(&mut env, given_variables(&args.process.env)?);
    let workdir = args.process.workdir.as_deref().or(image.workdir.as_deref()).unwrap_or("/");
    let limit: PosixRlimit = serde_json::from_value(serde_json::json!({
        "type": "RLIMIT_NOFILE", "hard": 1_048_576_u64, "soft": 1024
    }))?;
    let process = ProcessBuilder::default()
        .terminal(args.process.tty)
        .args(command)
        .env(env)
        .cwd(absolute(workdir)?)
        .capabilities(capabilities()?)
        .rlimits(vec![limit])
        .no_new_privileges(false)
        .build()?;
    Ok(process)
}

/// The process that `exec` starts in a container whose own process is `container`.
pub(crate) fn exec_process(
    container: &Process,
    args: &ProcessArgs,
    command: &[String],
) -> Result<Process, Failure> {
    let mut process = container.clone();
    let mut variables = container.env().clone().unwrap_or_default();
    if args.tty && !variables.iter().any(|variable| variable.starts_with("TERM=")) {
        variables.push("TERM=xterm".into());
    }
    set_variables(&mut variables, given_variables(&args.env)?);
    process.set_terminal(Some(args.tty)).set_args(Some(command.to_vec())).set_env(Some(variables));
    if let Some(workdir) = &args.workdir {
        process.set_cwd(absolute(workdir)?.into());
    }
    Ok(process)
}

/// The whole configuration.
pub(crate) fn spec(args: &RunArgs, process: Process, hostname: &str) -> Result<Spec, Failure> {
    let mut mounts = get_default_mounts();
    volume::add(&mut mounts, args.volume.iter().chain(&args.mount))?;
    build(args, process, hostname, mounts)
        .map_err(|e| Failure::from(e).context("cannot make the container's configuration"))
}

fn build(args: &RunArgs, process: Process, hostname: &str, mounts: Vec<Mount>) -> Result<Spec, OciSpecError> {
    let namespace = |kind| LinuxNamespaceBuilder::default().typ(kind).build();
    let namespaces = [
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Cgroup,
    ];
    let namespaces: Result<Vec<_>, _> = namespaces.into_iter().map(namespace).collect();
    let mut resources = LinuxResourcesBuilder::default()
        .devices(vec![LinuxDeviceCgroupBuilder::default().allow(false).access("rwm").build()?]);
    if let Some(limit) = args.pids_limit {
        resources = resources.pids(LinuxPidsBuilder::default().limit(i64::from(limit)).build()?);
    }
    let mut masked = get_default_maskedpaths();
    masked.extend(MORE_MASKED_PATHS.map(str::to_owned));
    let linux = LinuxBuilder::default()
        .namespaces(namespaces?)
        .resources(resources.build()?)
        .masked_paths(masked)
        .readonly_paths(get_default_readonly_paths())
        .build()?;
    SpecBuilder::default()
        .version("1.0.2")
        .process(process)
        .root(RootBuilder::default().path("rootfs").readonly(args.read_only).build()?)
        .hostname(hostname)
        .mounts(mounts)
        .linux(linux)
        .build()
}

fn capabilities() -> Result<oci_spec::runtime::LinuxCapabilities, OciSpecError> {
    let set: Capabilities = CAPABILITIES.into_iter().collect();
    LinuxCapabilitiesBuilder::default()
        .bounding(set.clone())
        .effective(set.clone())
        .permitted(set)
        .inheritable(Capabilities::new())
        .ambient(Capabilities::new())
        .build()
}

fn absolute(directory: &str) -> Result<&str, Failure> {
    if directory.starts_with('/') {
        return Ok(directory);
    }
    Err(Failure::new(format!("the working directory {directory:?} is not absolute: begin it with '/'")))
}

/// The variables of `-e`: as given, or the launcher's own of that name if it has one.
fn given_variables(given: &[String]) -> Result<Vec<String>, Failure> {
    let mut variables = Vec::with_capacity(given.len());
    for variable in given {
        match variable.split_once('=') {
            Some(("", _)) => return Err(Failure::new(format!("the variable {variable:?} has no name"))),
            Some(_) => variables.push(variable.clone()),
            None => variables.extend(std::env::var(variable).ok().map(|value| format!("{variable}={value}"))),
        }
    }
    Ok(variables)
}

/// Sets variables, each in place of an older one of its name.
fn set_variables(env: &mut Vec<String>, variables: impl IntoIterator<Item = String>) {
    for variable in variables {
        let name = variable.split_once('=').map_or(variable.as_str(), |(name, _)| name);
        match env.iter_mut().find(|old| old.split_once('=').is_some_and(|(old, _)| old == name)) {
            Some(old) => *old = variable,
            None => env.push(variable),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn args(words: &[&str]) -> RunArgs {
        match Cli::try_parse_from(["bulkhead", "run"].iter().chain(words)).unwrap().command {
            Command::Run(args) => args,
            other => panic!("{other:?}"),
        }
    }

    fn image(json: &str) -> ImageDefaults {
        let json = format!(
            r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":[]}},"config":{json}}}"#
        );
        ImageDefaults::from(&serde_json::from_str::<ImageConfiguration>(&json).unwrap())
    }

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn the_command_is_the_entrypoint_and_the_arguments_that_were_given_or_are_the_images() {
        let full = image(r#"{"Entrypoint":["/init","-v"],"Cmd":["serve"]}"#);
        assert_eq!(full.command(&[]).unwrap(), ["/init", "-v", "serve"]);
        assert_eq!(full.command(&strings(&["sh"])).unwrap(), ["/init", "-v", "sh"]);
        assert_eq!(image(r#"{"Cmd":["bash"]}"#).command(&strings(&["ls"])).unwrap(), ["ls"]);
        assert!(image("{}").command(&[]).is_err());
    }

    #[test]
    fn variables_of_the_command_line_win_over_the_images_and_those_over_the_defaults() {
        let image = image(r#"{"Env":["PATH=/bin","A=image","B=image"]}"#);
        let process =
            process(&args(&["-e", "A=mine", "-e", "BULKHEAD_NOT_SET", "i"]), &image, &strings(&["x"]), "h");
        let env = process.unwrap().env().clone().unwrap();
        assert_eq!(env, ["PATH=/bin", "HOSTNAME=h", "A=mine", "B=image"]);
        assert!(given_variables(&strings(&["=x"])).is_err());
    }

    #[test]
    fn the_images_directory_and_stop_signal_hold_unless_others_are_said() {
        let image = image(r#"{"WorkingDir":"/srv","StopSignal":"SIGQUIT","User":"www"}"#);
        let cwd =
            |words: &[&str]| process(&args(words), &image, &strings(&["x"]), "h").map(|p| p.cwd().clone());
        assert_eq!(cwd(&["i"]).unwrap(), std::path::Path::new("/srv"));
        assert_eq!(cwd(&["-w", "/tmp", "i"]).unwrap(), std::path::Path::new("/tmp"));
        assert!(cwd(&["-w", "tmp", "i"]).is_err());
        assert_eq!((image.stop_signal().unwrap(), image.user.as_str()), (3, "www"));
    }

    #[test]
    fn a_container_gets_dockers_capabilities_namespaces_and_limits() {
        let args = args(&["--pids-limit", "50", "--read-only", "i"]);
        let process = process(&args, &ImageDefaults::default(), &strings(&["x"]), "h").unwrap();
        let spec = serde_json::to_value(spec(&args, process, "h").unwrap()).unwrap();
        assert_eq!(spec["linux"]["resources"]["pids"]["limit"], 50);
        assert_eq!(spec["root"]["readonly"], true);
        assert_eq!(spec["linux"]["namespaces"].as_array().unwrap().len(), 5);
        let capabilities = &spec["process"]["capabilities"];
        assert_eq!(capabilities["bounding"].as_array().unwrap().len(), 14);
        assert_eq!(capabilities["inheritable"].as_array().unwrap().len(), 0);
        assert!(!capabilities["effective"].to_string().contains("SYS_ADMIN"));
        assert_eq!(spec["linux"]["resources"]["devices"][0]["allow"], false);
    }

    #[test]
    fn an_exec_has_the_containers_environment_and_its_own_command() {
        let args = args(&["-e", "A=1", "i"]);
        let container = process(&args, &ImageDefaults::default(), &strings(&["x"]), "h").unwrap();
        let args = ProcessArgs {
            interactive: false,
            tty: true,
            env: strings(&["B=2"]),
            workdir: Some("/tmp".into()),
            user: None,
        };
        let exec = exec_process(&container, &args, &strings(&["sh"])).unwrap();
        let env = exec.env().clone().unwrap();
        assert!(
            env.contains(&"A=1".into()) && env.contains(&"B=2".into()) && env.contains(&"TERM=xterm".into())
        );
        assert_eq!((exec.terminal(), exec.args().clone().unwrap()), (Some(true), strings(&["sh"])));
        assert_eq!(exec.capabilities(), container.capabilities());
    }
}
