//! The command line.

use std::path::PathBuf;

use bulkhead_sandbox::size::Size;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::spec::volume::{Volume, parse_mount, parse_volume};

/// Runs containers, each in a virtual machine of its own.
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version, max_term_width = 100, disable_help_subcommand = true)]
#[command(after_help = "\
Images are kept in /var/lib/bulkhead, running containers in /run/bulkhead; BULKHEAD_ROOT and BULKHEAD_RUN name other \
directories. The VMM, the guest's kernel and its image are found beside this program; BULKHEAD_LIBEXEC and BULKHEAD_SHARE \
name other directories. BULKHEAD_CONFIG names another file than /etc/bulkhead/config.toml. BULKHEAD_LOG=debug tells what \
happens.")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command in a new container, in a new virtual machine
    Run(RunArgs),
    /// Run another command in a running container
    Exec(ExecArgs),
    /// List containers
    Ps(PsArgs),
    /// Show what a container has written
    Logs(LogsArgs),
    /// Ask a container to end, and kill it if it does not
    Stop(StopArgs),
    /// Send a signal to a container
    Kill(KillArgs),
    /// Remove containers that have ended
    Rm(RmArgs),
    /// Manage images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Look into the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Check whether this host can run containers in virtual machines
    Check(CheckArgs),
    /// Show the versions of this program and of what it is installed with
    Version,
    /// Run a container whose launcher has gone: what `run -d` leaves in the background
    #[command(hide = true)]
    Supervise(RunArgs),
}

/// How a command runs, whether as the first of its container or not.
#[derive(Clone, Debug, Args)]
pub(crate) struct ProcessArgs {
    /// Pass standard input on to the command
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Set a variable, or pass on the one of this name
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// The command's working directory
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// Whom to run the command as, by name or number, looked up in the image
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
}

/// Arguments of `run`.
#[allow(clippy::struct_excessive_bools, reason = "each is an option of its own on the command line")]
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
The container has a loopback interface and no other network for now. It exits with the code of its command, with 128+n when \
signal n ended it, with 127 when the command was not found, 126 when it cannot be executed, and 125 when Bulkhead failed.")]
pub(crate) struct RunArgs {
    /// Leave the container running in the background and print its id
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Keep nothing of the container when it has ended. In the foreground it then has no log either
    #[arg(long = "rm")]
    pub(crate) remove: bool,
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    /// Name of the container
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// CPUs of the virtual machine [default: as a bundle's limits need, otherwise 2 or the configuration's]
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<u32>,
    /// Memory of the virtual machine, such as 512M or 4G; the guest's kernel and agent keep an eighth of it, at least 8 and at
    /// most 32 MiB, and the container can use the rest [default: as a bundle's limits need, otherwise 1G or the
    /// configuration's]
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<Size>,
    /// Mount a file or directory of the host at DST in the container, which sees what the host changes and the other way round.
    /// With `:ro` the container cannot write to it
    #[arg(short, long, value_name = "SRC:DST[:ro]", value_parser = parse_volume)]
    pub(crate) volume: Vec<Volume>,
    /// The same as type=bind,source=SRC,target=DST, with readonly added for `:ro`
    #[arg(long, value_name = "type=bind,...", value_parser = parse_mount)]
    pub(crate) mount: Vec<Volume>,
    /// Most processes and threads that the container may have
    #[arg(long, value_name = "N")]
    pub(crate) pids_limit: Option<u32>,
    /// Make the container's root read-only
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Keep what the container writes on a disk of this size on the host. Without it, it is kept in half of the machine's
    /// memory
    #[arg(long, value_name = "SIZE")]
    pub(crate) storage: Option<Size>,
    /// The container's hostname [default: its id]
    #[arg(long)]
    pub(crate) hostname: Option<String>,
    /// Take a directory, or an EROFS or ext4 image, for the container's root, instead of IMAGE. It is not written to
    #[arg(long, value_name = "DIR|IMG", conflicts_with = "bundle")]
    pub(crate) rootfs: Option<PathBuf>,
    /// Run an OCI bundle: a directory with config.json and a root, instead of IMAGE. What the container writes to its root is
    /// in that directory
    #[arg(long, value_name = "DIR", conflicts_with_all =
        ["env", "workdir", "user", "hostname", "pids_limit", "read_only", "storage", "volume", "mount"])]
    pub(crate) bundle: Option<PathBuf>,
    /// Show afterwards, on standard error, where the time went
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "text")]
    pub(crate) timings: Option<TimingsFormat>,
    /// The image (none with --rootfs or --bundle), then the command
    #[arg(value_name = "IMAGE [--] COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) words: Vec<String>,
}

/// How `--timings` writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TimingsFormat {
    /// For people
    Text,
    /// For programs: one line
    Json,
}

/// Arguments of `exec`.
#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    /// Name or id of the container, or the beginning of its id
    pub(crate) container: String,
    /// The command
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

/// Arguments of `ps`.
#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Also those that have ended
    #[arg(short, long)]
    pub(crate) all: bool,
    /// One JSON array
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `logs`.
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Go on until the container ends
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Name or id of the container, or the beginning of its id
    pub(crate) container: String,
}

/// Arguments of `stop`.
#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// Seconds until the container is killed
    #[arg(short = 't', long = "time", value_name = "SECONDS", default_value_t = 10)]
    pub(crate) grace: u32,
    /// Names or ids of containers, or the beginnings of their ids
    #[arg(required = true)]
    pub(crate) containers: Vec<String>,
}

/// Arguments of `kill`.
#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    /// The signal, by name or number
    #[arg(short, long, default_value = "KILL")]
    pub(crate) signal: String,
    /// Names or ids of containers, or the beginnings of their ids
    #[arg(required = true)]
    pub(crate) containers: Vec<String>,
}

/// Arguments of `rm`.
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Kill those that still run
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Names or ids of containers, or the beginnings of their ids
    #[arg(required = true)]
    pub(crate) containers: Vec<String>,
}

/// What can be done with the configuration.
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Show every value that holds, and which file or variable it came from
    Explain,
}

/// What can be done with images.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Import all images of an OCI layout directory, an OCI archive or a file of `docker save`, or one from a registry
    Import {
        /// Name for the image, instead of what the source calls it
        #[arg(short, long)]
        name: Option<String>,
        /// The directory or tar file, or docker://REFERENCE for an image in a registry that asks for no password
        #[arg(value_name = "DIR|FILE|docker://REFERENCE")]
        source: PathBuf,
    },
    /// List images
    Ls {
        /// One JSON array
        #[arg(long)]
        json: bool,
    },
    /// Remove images by name or digest
    Rm {
        /// The images
        #[arg(required = true)]
        images: Vec<String>,
    },
}

/// Arguments of `check`.
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// One JSON array
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn run(args: &[&str]) -> RunArgs {
        let words = ["bulkhead", "run"].iter().chain(args);
        match Cli::try_parse_from(words).unwrap().command {
            Command::Run(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_after_the_image_belong_to_the_command() {
        let args = run(&["--rm", "-e", "A=1", "debian", "ls", "--rm", "-l"]);
        assert!(args.remove);
        assert_eq!(args.words, ["debian", "ls", "--rm", "-l"]);
        assert!(run(&["-it", "debian"]).process.tty);
    }

    #[test]
    fn a_bundle_has_its_own_settings() {
        assert!(Cli::try_parse_from(["bulkhead", "run", "--bundle", "b", "--user", "x"]).is_err());
        assert!(Cli::try_parse_from(["bulkhead", "run", "--bundle", "b", "--rootfs", "x"]).is_err());
        assert!(Cli::try_parse_from(["bulkhead", "run", "--bundle", "b", "-v", "/a:/b"]).is_err());
    }
}
