#!/usr/bin/env bash
# Reads what go build -v prints: counts the packages, and prints the count now and then. What is no package's name is
# an error, and is passed on.
set -euo pipefail

packages=0 printed=0
while read -r line; do
	if [[ $line =~ ^[A-Za-z0-9._/~-]+$ ]]; then
		packages=$((packages + 1))
	elif [[ $line != 'go: downloading '* ]]; then
		printf '%s\n' "$line"
	fi
	if ((SECONDS >= printed + 20)); then
		printed=$SECONDS
		echo "    $packages packages after $printed s"
	fi
done
echo "    done: $packages packages, $SECONDS s"
