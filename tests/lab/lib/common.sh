# Messages, the cache and Debian's mirror; shared by the lab and the image builders.
# shellcheck shell=bash

cache=${XDG_CACHE_HOME:-$HOME/.cache}/bulkhead

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
  say "$*"
  exit 125
}

need() {
  local program missing=()
  for program; do
    type -P "$program" >/dev/null || missing+=("$program")
  done
  ((${#missing[@]} == 0)) || die "missing: ${missing[*]}; apt-get install the packages in tests/packages"
}

# hash_of PATH...: names a cache entry by the content of its recipe, whatever directory the checkout is in.
hash_of() {
  find "$@" -type f -print0 | sort -z | xargs -0 sha256sum | cut -d' ' -f1 | sha256sum | cut -c1-16
}

# The mirror that this machine installs Debian itself from, as apt sees it.
debian_mirror() {
  local codename mirror
  codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
  # shellcheck disable=SC2016
  mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
    awk -v codename="$codename" '$2 == codename && $3 == "main" && !found {print $1; found = 1}')
  [[ -n $mirror ]] || die "no Debian mirror for $codename in apt's sources; set BULKHEAD_MIRROR"
  echo "$mirror"
}

# debian_tree RELEASE DIR PACKAGES [OPTION...]: unpacks a release of Debian in DIR; a package called NAME/SUITE comes from that other
# release. In namespaces of its own, so that a killed build leaves no mount and no process behind.
debian_tree() {
  local release=$1 dir=$2 packages=$3 mirror=${BULKHEAD_MIRROR:-} suite sources=()
  shift 3
  # A mirror's copy of what is not released yet may be older than its index says that it is good for.
  [[ $release == trixie ]] || set -- --aptopt='Acquire::Check-Valid-Until "false"' "$@"
  [[ -n $mirror ]] || mirror=$(debian_mirror)
  ((EUID == 0)) || die "building an image takes root"
  [[ -e /usr/share/keyrings/debian-archive-keyring.gpg ]] || die "missing: debian-archive-keyring"
  for suite in $(tr , '\n' <<<"$release,$packages" | sed -n '1p; s|.*/||p' | sort -u); do
    sources+=("deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main")
  done
  # Where / is no mount point, in a chroot, its propagation cannot be changed and is left as it is.
  # shellcheck disable=SC2016
  setpriv --pdeathsig KILL unshare --mount --propagation unchanged --pid --fork --kill-child \
    sh -c 'mount --make-rprivate / 2>/dev/null; exec "$@"' - \
    mmdebstrap --quiet --mode=root --format=directory ${packages:+--include="$packages"} "$@" \
    "$release" "$dir" "${sources[@]}"
}

# cached ENTRY BUILDER: prints the directory ENTRY of the cache, made by BUILDER DIR if it is not there yet. Whoever
# comes second waits; what is half made never bears the final name.
cached() {
  local entry=$cache/$1 builder=$2 lock scratch
  if [[ ! -d $entry ]]; then
    mkdir -p "$(dirname "$entry")"
    exec {lock}>"$(dirname "$entry")/.lock"
    flock "$lock"
    if [[ ! -d $entry ]]; then
      rm -rf --one-file-system "$(dirname "$entry")"/.new.*
      scratch=$(mktemp -d "$(dirname "$entry")/.new.XXXXXX")
      # shellcheck disable=SC2064
      trap "rm -rf --one-file-system '$scratch'" EXIT
      "$builder" "$scratch" >&2
      mv "$scratch" "$entry"
      trap - EXIT
    fi
    exec {lock}>&-
  fi
  echo "$entry"
}
