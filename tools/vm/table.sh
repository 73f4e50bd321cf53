#!/usr/bin/env bash
# Prints what runs of test-vm.sh found, as Markdown: what was booted, and of each boot and tier on each kernel how many
# scenarios were right.
#
#   tools/vm/table.sh DIR...      DIR: OUT of a run; of two runs of the same boot the later DIR counts
set -euo pipefail

(($#)) || { echo "usage: $0 DIR..." >&2; exit 2; }
for dir; do
	[[ -e $dir/rows.tsv ]] || { echo "$0: $dir/rows.tsv: not there: $dir is not OUT of a run that ended" >&2; exit 2; }
done

# A line is: booted KERNEL RELEASE PAGE FROM, verdict RUN KERNEL BOOT VERDICT SECONDS WHY, or
# row RUN KERNEL BOOT TIER SCENARIO RESULT DETAIL.
lines() {
	local dir run=0
	for dir; do sed 's/^/booted\t/' "$dir/booted.tsv"; done | sort -V
	for dir; do
		run=$((run + 1))
		sed "s/^/verdict\t$run\t/" "$dir/verdicts.tsv"
		sed "s/^/row\t$run\t/" "$dir/rows.tsv"
	done
}
lines "$@" | awk -F'\t' '
	function title(boot) {
		return boot == "confined" ? "cgroup v2, with less than a pod should have" : boot == "faults" ? "cgroup v2, with wrong fields in the program" : \
			boot == "numa" ? "cgroup v2, two NUMA nodes" : boot == "v1" ? "cgroup v1" : "cgroup v2"
	}
	function with_item(list, item) { return list == "" ? item : index(", " list ", ", ", " item ", ") ? list : list ", " item }
	BEGIN { count = split("v2 confined faults v1 numa", boots, " "); split("fentry kprobe stack none", known, " ") }
	$1 == "booted" { if (!($2 in release)) kernels[++k] = $2; release[$2] = $3; page[$2] = $4; from[$2] = $5 }
	$1 == "verdict" { last[$3, $4] = $2; verdict[$3, $4] = $5; seconds[$3, $4] = $6; why[$3, $4] = $7 }
	$1 == "row" { line[++lines] = $0 }
	END {
		print "| kernel | release | pages | package | boots |"
		print "|---|---|---|---|---|"
		for (i = 1; i <= k; i++) {
			kernel = kernels[i]; text = ""
			for (b = 1; b <= count; b++) if ((kernel, boots[b]) in verdict) {
				text = text (text ? "; " : "") boots[b] ": " verdict[kernel, boots[b]]
				if (verdict[kernel, boots[b]] != "n/a") text = text ", " seconds[kernel, boots[b]] " s"
				if (why[kernel, boots[b]] ~ /second try/) text = text " (at the second try)"
			}
			printf "| %s | %s | %s | %s | %s |\n", kernel, release[kernel], page[kernel], from[kernel], text
		}
		for (l = 1; l <= lines; l++) {
			split(line[l], f, "\t")
			kernel = f[3]; boot = f[4]; tier = f[5]; scenario = f[6]; result = f[7]; detail = f[8]
			if (f[2] != last[kernel, boot]) continue
			if (scenario == "verifier" && result == "ok") { split(detail, part, " "); if (part[1] > most[kernel, tier]) most[kernel, tier] = part[1] }
			if (!((boot, tier) in seen)) { seen[boot, tier] = 1; tiers[boot] = tiers[boot] " " tier }
			if (!((boot, scenario) in seen)) { seen[boot, scenario] = 1; scenarios[boot] = scenarios[boot] (scenarios[boot] ? ", " : "") scenario }
			n[kernel, boot, tier, result]++
			if (result != "ok") {
				key = result (detail ? ": " detail : "")
				if (!((boot, key) in where)) { order[boot, ++notes[boot]] = key; where[boot, key] = what[boot, key] = "" }
				where[boot, key] = with_item(where[boot, key], kernel " " tier)
				what[boot, key] = with_item(what[boot, key], scenario)
			}
		}
		for (b = 1; b <= count; b++) {
			boot = boots[b]; head = "| tier |"; rule = "|---|"; any = 0
			for (i = 1; i <= k; i++) if ((kernels[i], boot) in verdict) { head = head " " kernels[i] " |"; rule = rule "---|"; any = 1 }
			if (!any) continue
			printf "\n### %s\n\n%s\n%s\n", title(boot), head, rule
			m = split(tiers[boot] ? tiers[boot] : "-", t, " ")
			for (j = 1; j <= m; j++) {
				text = "| " t[j] " |"
				for (i = 1; i <= k; i++) if ((kernels[i], boot) in verdict) {
					kernel = kernels[i]; cell = ""
					if (n[kernel, boot, t[j], "ok"]) cell = n[kernel, boot, t[j], "ok"] " ok"
					if (n[kernel, boot, t[j], "FAIL"]) cell = cell (cell ? ", " : "") n[kernel, boot, t[j], "FAIL"] " FAIL"
					if (n[kernel, boot, t[j], "n/a"]) cell = cell (cell ? ", " : "") n[kernel, boot, t[j], "n/a"] " n/a"
					if (!cell) cell = verdict[kernel, boot] == "ok" ? (t[j] == "-" ? "ok" : "-") : verdict[kernel, boot]
					text = text " " cell " |"
				}
				print text
			}
			if (scenarios[boot]) printf "\nScenarios: %s.\n", scenarios[boot]
			head = ""
			for (i = 1; i <= k; i++) if (((kernels[i], boot) in verdict) && verdict[kernels[i], boot] != "ok") { printf "%s- %s: %s: %s\n", head ? "" : "\n", kernels[i], verdict[kernels[i], boot], why[kernels[i], boot]; head = 1 }
			for (i = 1; i <= notes[boot]; i++) { key = order[boot, i]; printf "%s- %s. Kernels and tiers: %s. Scenarios: %s.\n", head ? "" : "\n", key, where[boot, key], what[boot, key]; head = 1 }
		}
		head = "| tier |"; rule = "|---|"; any = 0
		for (i = 1; i <= k; i++) for (j = 1; j in known; j++) if ((kernels[i], known[j]) in most) { head = head " " kernels[i] " |"; rule = rule "---|"; with[++any] = kernels[i]; break }
		if (!any) exit
		printf "\n### Instructions that the verifier went through, of the largest program\n\n%s\n%s\n", head, rule
		for (j = 1; j in known; j++) {
			text = "| " known[j] " |"
			for (i = 1; i <= any; i++) text = text " " ((with[i], known[j]) in most ? most[with[i], known[j]] : "-") " |"
			print text
		}
	}'
