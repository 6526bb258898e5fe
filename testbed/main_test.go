package testbed

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// router is of the labs in these tests. Each has a network of its own: they may run at the same time.
var router = netip.MustParsePrefix("10.99.0.1/24")

// TestMain makes the test program all the programs that a lab is made of.
func TestMain(m *testing.M) {
	switch {
	case IsInside(os.Args):
		os.Exit(RunInside(os.Args))
	case len(os.Args) > 1 && os.Args[1] == "serve":
		fmt.Fprintln(os.Stderr, http.ListenAndServe(os.Args[2], http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "%s %d\n", os.Getenv("http_proxy"), os.Getpid())
		})))
		os.Exit(3)
	case len(os.Args) > 1 && os.Args[1] == "hold":
		hold(os.Args[2])
	}
	goleak.VerifyTestMain(m)
}

// hold has a lab with a machine that is on, until it is killed.
func hold(dir string) {
	lab, err := Start(context.Background(), Config{Dir: dir, Router: router, Nodes: []Node{{Name: "n1", Memory: 128, Disk: -1}}})
	if err == nil {
		err = lab.Power(context.Background(), "n1", On)
	}
	fmt.Println(err)
	_, _ = io.Copy(io.Discard, os.Stdin)
	select {}
}

// startLab starts a lab that ends with the test, which shows what it said if it failed.
func startLab(t *testing.T, cfg Config) *Lab {
	t.Helper()
	if cfg.Dir == "" {
		cfg.Dir = t.TempDir()
	}
	cfg.Router = router
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	lab, err := Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Close(); err != nil {
			t.Errorf("closing the lab: %v", err)
		}
		if t.Failed() {
			t.Log(lab.Failure())
		}
	})
	return lab
}
