package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/troupe-dev/troupe/internal/qemu"
	"github.com/troupe-dev/troupe/schema"
	"github.com/troupe-dev/troupe/schema/load"
	"github.com/troupe-dev/troupe/testbed"
)

// labTime bounds what a lab may take to come up or go down.
const labTime = 2 * time.Minute

func newLabCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "lab",
		Short: "Run a fleet on QEMU machines, on a network of their own",
		Long: `The lab has QEMU machines with BIOS or UEFI firmware and blank disks, and a troupe
server, on a network of their own: no interface of the host is touched. It runs as
root, or as a user who may use /dev/net/tun and has subordinate IDs (subuid(5)).

All that a lab keeps lies in the directory --lab.`,
		Example: `  troupe lab up --fleet ./fleet --uefi n3
  troupe lab status
  troupe lab run -- troupe status
  troupe lab down`,
		Args: cobra.NoArgs, // what is no verb below is a mistake
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	dir := cmd.PersistentFlags().String("lab", defaultLab(), "the lab's directory")
	cmd.AddCommand(newLabUpCommand(dir), newLabDownCommand(dir), newLabStatusCommand(dir), newLabRunCommand(dir),
		newLabConsoleCommand(dir), newLabPowerCommand(dir), newLabLinkCommand(dir), newLabServerCommand(dir), newLabSuperviseCommand(), newLabInsideCommand())
	return cmd
}

// defaultLab is where the XDG Base Directory Specification has a program's state.
func defaultLab() string {
	state := os.Getenv("XDG_STATE_HOME")
	if state == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return ".lab"
		}
		state = filepath.Join(home, ".local", "state")
	}
	return filepath.Join(state, "troupe", "lab")
}

// labOptions are the flags of troupe lab up.
type labOptions struct {
	fleet, repo, branch, path string
	router                    string
	nodes                     labNodes
	page, accel               string
	off                       bool
	serveArgs                 []string
}

func newLabUpCommand(dir *string) *cobra.Command {
	var o labOptions
	cmd := &cobra.Command{
		Use:   "up [--fleet DIR | --repo URL|PATH] [-- FLAGS OF SERVE]",
		Short: "Start a lab and switch its machines on",
		Long: `Starts a lab: a network, a machine for each host of the fleet, and a server.

--fleet makes a Git repo from a directory: clone it from fleet.git in the lab's
directory, push, and the machines follow. --repo follows a repo that is there
already. Without either, the lab has machines and no server.

The server reaches the world by an HTTP proxy only: packages, and repos over http
and https. Machines cannot.`,
		Example: `  troupe lab up --fleet ./fleet
  troupe lab up --fleet ./fleet --nodes 2 --uefi n2
  troupe lab up --repo /srv/fleet.git --node n1 --node new=uefi,mac=52:54:00:00:00:99`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 && cmd.ArgsLenAtDash() != 0 {
				return fmt.Errorf("lab up takes no argument %q", args[0])
			}
			o.serveArgs = args
			return o.up(cmd, *dir)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.fleet, "fleet", "", "directory of a fleet to make a repo from")
	f.StringVar(&o.repo, "repo", "", "Git repo to follow")
	f.StringVar(&o.branch, "branch", "main", "branch to follow")
	f.StringVar(&o.path, "path", ".", "the fleet's directory in the repo")
	f.StringVar(&o.router, "router", "10.77.0.1/24", "address and network of a lab without a fleet")
	f.IntVar(&o.nodes.count, "nodes", 0, "have machines n1 to nN instead of one for each host")
	f.StringArrayVar(&o.nodes.each, "node", nil, "have this machine instead of one for each host (repeat for more):\nNAME[=bios|uefi][,mac=MAC][,memory=MIB][,cpus=N][,disk=SIZE]")
	f.StringSliceVar(&o.nodes.uefi, "uefi", nil, `machines with UEFI firmware, or "all"`)
	f.IntVar(&o.nodes.memory, "memory", testbed.DefaultMemory, "memory of a machine, in MiB")
	f.IntVar(&o.nodes.cpus, "cpus", 1, "CPUs of a machine")
	f.StringVar(&o.nodes.disk, "disk", "8G", `size of a machine's disk, which takes up what is written to it only; "none" for none`)
	f.StringVar(&o.page, "page", "127.0.0.1:0", `address on the host for the server's web page; "" for none`)
	f.StringVar(&o.accel, "accel", "", "kvm or tcg (default: kvm if a probe proves that it works)")
	f.BoolVar(&o.off, "off", false, "leave the machines switched off")
	cmd.MarkFlagsMutuallyExclusive("fleet", "repo")
	cmd.MarkFlagsMutuallyExclusive("nodes", "node")
	return cmd
}

// labSpec is what troupe lab supervise is told on its standard input.
type labSpec struct {
	testbed.Config
	PowerOn bool
}

// up makes the lab's repo, asks a supervisor to start the lab and waits until it has.
func (o labOptions) up(cmd *cobra.Command, dir string) error {
	ctx, cancel := context.WithTimeout(cmd.Context(), labTime)
	defer cancel()
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if _, err := testbed.Open(dir); err == nil {
		return fmt.Errorf("lab %q: %w (troupe lab down ends it and removes its disks, images, repo and logs; troupe lab down --keep leaves them)", dir, testbed.ErrRunning)
	} else if !errors.Is(err, testbed.ErrNoLab) {
		return err
	}
	fleet, repo, err := o.findFleet(ctx, dir)
	if err != nil {
		return err
	}
	spec := labSpec{PowerOn: !o.off}
	if spec.Config, err = o.config(dir, fleet, repo); err != nil {
		return err
	}
	if err := startSupervisor(ctx, spec); err != nil {
		return err
	}
	lab, err := testbed.Open(dir)
	if err != nil {
		return err
	}
	status, err := lab.Status(ctx)
	if err != nil {
		return err
	}
	out := cmd.OutOrStdout()
	text := fmt.Sprintf("lab %s: network %s, accelerator %s\n", dir, status.Router.Masked(), qemu.AccelText(status.Accel, status.Why))
	if o.fleet != "" {
		text += fmt.Sprintf("repo: %s (a working copy: %s)\n", repo, filepath.Join(dir, "fleet"))
	}
	if status.Page != "" {
		text += fmt.Sprintf("page: %s\n", status.Page)
	}
	if _, err := io.WriteString(out, text); err != nil {
		return err
	}
	return printNodes(out, status.Nodes)
}

// findFleet loads the fleet, if there is one, and says which repo the server shall follow.
func (o labOptions) findFleet(ctx context.Context, dir string) (*schema.Fleet, string, error) {
	switch {
	case o.fleet != "":
		fleet, err := loadFleet(ctx, filepath.Join(o.fleet, o.path))
		if err != nil {
			return nil, "", err
		}
		bare := filepath.Join(dir, "fleet.git")
		if _, err := os.Stat(bare); err == nil {
			return nil, "", fmt.Errorf("lab %q has a repo from an earlier time: go on with --repo %s, or begin anew after troupe lab down", dir, bare)
		}
		_, err = testbed.MakeRepo(ctx, bare, filepath.Join(dir, "fleet"), o.fleet)
		return fleet, bare, err
	case o.repo != "":
		tmp, err := os.MkdirTemp("", "troupe-lab-*")
		if err != nil {
			return nil, "", err
		}
		defer func() { _ = os.RemoveAll(tmp) }()
		repo := o.repo
		if _, err := os.Stat(repo); err == nil {
			if repo, err = filepath.Abs(repo); err != nil {
				return nil, "", err
			}
		}
		clone := filepath.Join(tmp, "fleet")
		out, err := exec.CommandContext(ctx, "git", "clone", "--quiet", "--branch", o.branch, "--", repo, clone).CombinedOutput()
		if err != nil {
			return nil, "", fmt.Errorf("reading the fleet: git clone: %w: %s", err, bytes.TrimSpace(out))
		}
		fleet, err := loadFleet(ctx, filepath.Join(clone, o.path))
		return fleet, repo, err
	}
	return nil, "", nil
}

func loadFleet(ctx context.Context, dir string) (*schema.Fleet, error) {
	if info, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("reading the fleet: %w", err)
	} else if !info.IsDir() {
		return nil, fmt.Errorf("reading the fleet: %q is not a directory", dir)
	}
	fleet, err := (&load.Loader{}).Load(ctx, os.DirFS(dir))
	var problems schema.Problems
	if errors.As(err, &problems) {
		return nil, differs(problems)
	}
	return fleet, err
}

// config is the lab that the flags and the fleet ask for.
func (o labOptions) config(dir string, fleet *schema.Fleet, repo string) (testbed.Config, error) {
	cfg := testbed.Config{Dir: dir, Page: o.page, Accel: o.accel}
	if !slices.Contains([]string{"", "kvm", "tcg"}, o.accel) {
		return cfg, fmt.Errorf("flag --accel %q: want kvm or tcg", o.accel)
	}
	var known []testbed.Node
	var err error
	if fleet != nil {
		cfg.Router, known = testbed.RouterOf(fleet), testbed.NodesOf(fleet)
		cfg.Serve.Args = append(testbed.ServeArgs(dir, repo, o.branch, o.path), o.serveArgs...)
	} else if cfg.Router, err = netip.ParsePrefix(o.router); err != nil {
		return cfg, fmt.Errorf("flag --router: %w", err)
	} else {
		cfg.Page = ""
	}
	cfg.Nodes, err = o.nodes.choose(known)
	return cfg, err
}

// startSupervisor starts a process that goes on after this one, and waits for its word that the lab is up.
func startSupervisor(ctx context.Context, spec labSpec) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	in, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(spec.Dir, 0o755); err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(spec.Dir, "lab.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	word, wordW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer word.Close()
	cmd := exec.Command(self, "lab", "supervise") //nolint:noctx // the lab outlives the command that starts it
	cmd.Stdin, cmd.Stderr, cmd.ExtraFiles = bytes.NewReader(in), log, []*os.File{wordW}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	wordW.Close()
	if err != nil {
		return err
	}
	// Whoever gives up leaves no half-made lab: the supervisor takes SIGTERM as the end.
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Signal(syscall.SIGTERM) })
	defer stop()
	said, err := io.ReadAll(bufio.NewReader(word))
	text := strings.TrimSpace(string(said))
	if err == nil && text == "ok" {
		return nil
	}
	if text == "" {
		text = fmt.Sprintf("the lab's supervisor ended; see %s", log.Name())
	}
	return errors.Join(errors.New(text), cmd.Wait(), context.Cause(ctx))
}

// newLabSuperviseCommand is the outer half of a lab that was started by lab up.
func newLabSuperviseCommand() *cobra.Command {
	return &cobra.Command{
		Use: "supervise", Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			word := os.NewFile(3, "word")
			syscall.CloseOnExec(3)
			defer word.Close()
			err := supervise(cmd, func() error {
				_, err := fmt.Fprintln(word, "ok")
				return errors.Join(err, word.Close())
			})
			if err != nil {
				_, _ = fmt.Fprintln(word, err) // closed already where the lab was up
			}
			return err
		},
	}
}

func supervise(cmd *cobra.Command, ready func() error) error {
	var spec labSpec
	if err := json.NewDecoder(cmd.InOrStdin()).Decode(&spec); err != nil {
		return fmt.Errorf("reading what the lab shall be (this verb is a part of lab up): %w", err)
	}
	spec.Log = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
	ctx, cancel := context.WithTimeout(cmd.Context(), labTime)
	defer cancel()
	lab, err := testbed.Start(ctx, spec.Config)
	if err != nil {
		return err
	}
	if err := begin(ctx, lab, spec); err != nil {
		return errors.Join(err, lab.Close())
	}
	if err := ready(); err != nil {
		return errors.Join(err, lab.Close())
	}
	cancel()
	select {
	case <-cmd.Context().Done():
	case <-lab.Ended():
	}
	return lab.Close()
}

// begin waits for the server, so that machines do not boot into nothing, and switches them on.
func begin(ctx context.Context, lab *testbed.Lab, spec labSpec) error {
	if len(spec.Serve.Args) > 0 {
		if err := lab.WaitServer(ctx); err != nil {
			return err
		}
	}
	if !spec.PowerOn {
		return nil
	}
	for _, n := range spec.Nodes {
		if err := lab.Power(ctx, n.Name, testbed.On); err != nil {
			return err
		}
	}
	return nil
}

// newLabInsideCommand is the inner half of every lab.
func newLabInsideCommand() *cobra.Command {
	return &cobra.Command{
		Use: "inside", Hidden: true, Args: cobra.RangeArgs(1, 2),
		RunE: func(*cobra.Command, []string) error {
			if status := testbed.RunInside(os.Args); status != 0 {
				return &exitError{status: status}
			}
			return nil
		},
	}
}
