# shellcheck shell=bash
# Builds what the tests run, once. Read by the scripts that say how.
#
# It lies in the user's cache directory under its version, so that another version is another file.

# Of the scripts that read this.
# shellcheck disable=SC2034
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/oom-tracer
go=${GO:-$(command -v go || echo /usr/local/go/bin/go)} # as the Makefile has it

# version MODULE prints its version in the build list of the working directory.
version() { "$go" list -m -f '{{.Version}}' "$1"; }

# source_of MODULE prints the directory with its source.
source_of() { "$go" mod download "$1" >&2 && "$go" list -m -f '{{.Dir}}' "$1"; }

# once NAME WHAT BUILD prints the path of NAME, a file or a directory. If it is not there, BUILD makes it at the path that it is given.
once() {
	local path=$cache/$1
	if [[ ! -e $path ]]; then
		echo "==> $2, once" >&2
		mkdir -p "$cache"
		partial=$(mktemp -d "$cache/.partial-XXXXXX")
		trap 'rm -rf "$partial"' EXIT
		"$3" "$partial/${1##*/}" >&2
		chmod -R u+w,go+rX "$partial"
		# It is moved into place whole. Another process may have built it meanwhile.
		mv -T "$partial/${1##*/}" "$path" 2>/dev/null || [[ -e $path ]]
	fi
	echo "$path"
}
