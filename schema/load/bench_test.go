package load

import (
	"fmt"
	"strings"
	"testing"
	"testing/fstest"
)

// benchRoot has ten roles, each with something for each of its hosts.
func benchRoot() string {
	var b strings.Builder
	b.WriteString(`package fleet

network: {subnet: "10.0.0.0/8", router: "10.0.0.1", dynamic: "10.255.0.1-10.255.255.254"}
images: debian: {kind: "os", from: debian: {suite: "bookworm", kernel: "linux-image-cloud-amd64"}}
`)
	for i := range 10 {
		fmt.Fprintf(&b, `roles: r%d: {
	os: "debian"
	files: {
		"/etc/motd": "role %d\n"
		"/etc/app.conf": {content: "x = 1\n", mode: 0o600}
	}
	#host: _
	node: files: "/etc/issue": "\(#host.name) at \(#host.address) in \(#host.labels.rack)\n"
	healthy: [{http: {port: 80}}]
}
`, i, i)
	}
	return b.String()
}

// benchHosts is a file with the hosts from first on; salt changes one of them.
func benchHosts(first, n int, salt string) []byte {
	var b strings.Builder
	b.WriteString("package fleet\n\nhosts: {\n")
	for i := first; i < first+n; i++ {
		rack := fmt.Sprintf("k%d", i/40)
		if i == first {
			rack += salt
		}
		fmt.Fprintf(&b, "\tn%05d: {mac: \"52:54:00:%02x:%02x:%02x\", address: \"10.1.%d.%d\", role: \"r%d\", labels: rack: %q}\n",
			i, i>>16&255, i>>8&255, i&255, i>>8, i&255, i%10, rack)
	}
	b.WriteString("}\n")
	return []byte(b.String())
}

const benchShard = 100 // hosts in a directory

func benchFleet(n int, sharded bool) fstest.MapFS {
	tree := fstest.MapFS{"fleet.cue": {Data: []byte(benchRoot())}}
	if !sharded {
		tree["hosts.cue"] = &fstest.MapFile{Data: benchHosts(1, n, "")}
		return tree
	}
	for i := 0; i < n; i += benchShard {
		tree[fmt.Sprintf("hosts/s%03d/hosts.cue", i/benchShard)] = &fstest.MapFile{Data: benchHosts(i+1, benchShard, "")}
	}
	return tree
}

// BenchmarkLoad loads fleets of ten roles, with nothing known before, and starts the child for each.
func BenchmarkLoad(b *testing.B) {
	for _, layout := range []string{"flat", "sharded"} {
		for _, n := range []int{100, 1_000, 10_000} {
			b.Run(fmt.Sprintf("%s/%d", layout, n), func(b *testing.B) {
				tree := benchFleet(n, layout == "sharded")
				for b.Loop() {
					var l Loader
					if fleet, err := l.Load(b.Context(), tree); err != nil || len(fleet.Hosts) != n {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/float64(n), "µs/host")
			})
		}
	}
}

// BenchmarkReload loads a fleet of 10,000 hosts in directories of 100 again, after one host has changed.
func BenchmarkReload(b *testing.B) {
	b.Run("10000", func(b *testing.B) {
		tree := benchFleet(10_000, true)
		var l Loader
		if _, err := l.Load(b.Context(), tree); err != nil {
			b.Fatal(err)
		}
		i := 0
		for b.Loop() {
			i++
			tree["hosts/s042/hosts.cue"] = &fstest.MapFile{Data: benchHosts(4201, benchShard, fmt.Sprint(i))}
			if _, err := l.Load(b.Context(), tree); err != nil {
				b.Fatal(err)
			}
		}
	})
}
