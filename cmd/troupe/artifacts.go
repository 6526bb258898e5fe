package main

import (
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/spf13/cobra"
	"oras.land/oras-go/v2"

	"github.com/troupe-dev/troupe/images/artifact"
	"github.com/troupe-dev/troupe/images/filediff"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/reconciler/api"
)

const aboutPlaces = `A place is oci://HOST/NAME, a repository of a registry (oci+http:// without TLS; on a
loopback address it has none), or oci:DIR, an OCI image layout. Credentials are docker's.

REF is a tag: debian.base, web.delta or web.release for what is newest, one of these
with .VERSION, or the 64 digits of a recipe or a release. A release has all of its parts.`

func newImagePushCommand() *cobra.Command {
	var o remote
	var from, to string
	cmd := &cobra.Command{
		Use:   "push REF --to PLACE",
		Short: "Copy an image or a release to a registry or a directory",
		Long:  "Copies an artifact from the server, or with --from from another place.\n\n" + aboutPlaces,
		Example: `  troupe image push web.release --to oci://registry.example.com/fleet
  troupe image push web.release --to oci:/media/usb`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if to == "" {
				return errors.New("say --to where: oci://HOST/NAME or oci:DIR")
			}
			source, err := o.source(cmd, from)
			if err != nil {
				return err
			}
			return copyArtifact(cmd, source, args[0], to)
		},
	}
	o.flags(cmd)
	cmd.Flags().StringVar(&from, "from", "", "place to copy from, in place of the server")
	cmd.Flags().StringVar(&to, "to", "", "place to copy to")
	return cmd
}

// source is the server, or the place that is named.
func (r *remote) source(cmd *cobra.Command, place string) (oras.ReadOnlyTarget, error) {
	if place == "" {
		return r.client()
	}
	return artifact.Source(cmd.Context(), place)
}

func copyArtifact(cmd *cobra.Command, from oras.ReadOnlyTarget, ref, place string) error {
	to, err := artifact.Open(place)
	if err != nil {
		return err
	}
	desc, err := artifact.Copy(cmd.Context(), from, ref, to, "")
	if err = errors.Join(err, to.Close()); err != nil {
		return err
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s %s\n", ref, desc.Digest)
	return err
}

func newImagePullCommand() *cobra.Command {
	var o remote
	var from, to string
	cmd := &cobra.Command{
		Use:   "pull REF",
		Short: "Get an image or a release from a registry or a directory",
		Long: `Has the server get an artifact from its registry (serve --store). With --from and --to
it is copied from one place to another, without a server: into oci:DATA/store of a server
that does not run, for example, which takes it from there in place of a build.

` + aboutPlaces,
		Example: `  troupe image pull debian.base
  troupe image pull web.release --from oci:/media/usb --to oci:/var/lib/troupe/store`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if (from == "") != (to == "") {
				return errors.New("--from and --to go together: without them the server gets it from its own registry")
			}
			if from != "" {
				source, err := artifact.Source(cmd.Context(), from)
				if err != nil {
					return err
				}
				return copyArtifact(cmd, source, args[0], to)
			}
			c, err := o.client()
			if err != nil {
				return err
			}
			a, err := c.PullArtifact(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s %s\n", args[0], a.Digest)
			return err
		},
	}
	o.flags(cmd)
	cmd.Flags().StringVar(&from, "from", "", "place to copy from")
	cmd.Flags().StringVar(&to, "to", "", "place to copy to")
	return cmd
}

func newImageVerifyCommand() *cobra.Command {
	var o remote
	cmd := &cobra.Command{
		Use:   "verify [oci:DIR]",
		Short: "Read all of the store, and say what is not as it should be",
		Long: `Hashes every blob of the server's store again, or of an OCI image layout that no server
uses, looks for all that its manifests name, and computes the dm-verity tree of each
image. What is wrong is set aside; a server makes or gets it again.

Exit status: 0 all is well; 1 something is wrong; 2 it could not be looked at.`,
		Example: "  troupe image verify\n  troupe image verify oci:/media/usb",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			v, err := o.verify(cmd, args)
			if err != nil {
				return err
			}
			if err := o.print(cmd, v, func(w io.Writer) error { return writeVerification(w, v) }); err != nil {
				return err
			}
			if len(v.Problems) > 0 {
				return differs(nil)
			}
			return nil
		},
	}
	o.flags(cmd, "table", "json", "yaml")
	return cmd
}

func (r *remote) verify(cmd *cobra.Command, args []string) (v artifact.Verification, err error) {
	if len(args) == 0 {
		c, err := r.client()
		if err != nil {
			return v, err
		}
		return c.VerifyStore(cmd.Context())
	}
	dir, err := artifact.Directory(args[0])
	if err != nil {
		return v, err
	}
	s, err := store.Open(dir)
	if err != nil {
		return v, err
	}
	v, err = artifact.Verify(cmd.Context(), s)
	return v, errors.Join(err, s.Close())
}

func writeVerification(w io.Writer, v artifact.Verification) error {
	t := table{header: []string{"WHAT", "NAME", "ERROR"}, shrink: 2}
	for _, p := range v.Problems {
		t.add(p.What, p.Name, plain(p.Error))
	}
	all := fmt.Sprintf("%d blobs, %s; %d manifests; %d images", v.Blobs, api.Bytes(v.Bytes), v.Manifests, v.Images)
	return t.write(w, "all is well: "+all)
}

func newImageGCCommand() *cobra.Command {
	var o remote
	var dry bool
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "Delete from the store what nothing needs",
		Long: `Deletes what no host is assigned, runs, has staged or has in its cache, no disk began as,
the fleet in force has not, and nobody built or pulled in the last day. The server does
so by itself where less than 10% of its disk are free.`,
		Example: "  troupe image gc --dry-run",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := o.client()
			if err != nil {
				return err
			}
			out, err := c.Collect(cmd.Context(), dry)
			if err != nil {
				return err
			}
			return o.print(cmd, out, func(w io.Writer) error { return writeCollected(w, out) })
		},
	}
	o.flags(cmd, "table", "json", "yaml")
	cmd.Flags().BoolVar(&dry, "dry-run", false, "only say what would go")
	return cmd
}

func writeCollected(w io.Writer, c api.Collected) error {
	if len(c.Artifacts) > 0 {
		t := table{header: []string{"KIND", "NAME", "ID", "FREES"}}
		for _, a := range c.Artifacts {
			t.add(a.Kind, a.Name, a.ID.Short(), api.Bytes(a.Bytes))
		}
		if err := t.write(w, ""); err != nil {
			return err
		}
	}
	verb := "freed"
	if c.DryRun {
		verb = "would free"
	}
	_, err := fmt.Fprintf(w, "%s %s in %d files; %d artifacts stay\n", verb, api.Bytes(c.Bytes), c.Blobs, c.Kept)
	return err
}

func newImageDiffCommand() *cobra.Command {
	var o remote
	cmd := &cobra.Command{
		Use:   "diff BEFORE AFTER",
		Short: "Say in which packages and files two images, roles or releases differ",
		Long: `Compares two images, roles or releases, each named by name or by the first six or more
hex digits of a digest. A role is compared as its hosts see it, over its image.

Exit status: 0 they are the same; 1 they differ; 2 they could not be compared.`,
		Example: "  troupe image diff 1a2b3c4d web\n  troupe image diff web db -o json",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := o.client()
			if err != nil {
				return err
			}
			d, err := c.Diff(cmd.Context(), args[0], args[1])
			if err != nil {
				return err
			}
			if err := o.print(cmd, d, func(w io.Writer) error { return writeDiff(w, d) }); err != nil {
				return err
			}
			if len(d.Packages)+len(d.Files) > 0 {
				return differs(nil)
			}
			return nil
		},
	}
	o.flags(cmd, "table", "json", "yaml")
	return cmd
}

func writeDiff(w io.Writer, d api.Diff) error {
	if len(d.Packages)+len(d.Files) == 0 {
		_, err := fmt.Fprintln(w, "they are the same")
		return err
	}
	t := table{header: []string{"CHANGE", "WHAT", "BEFORE", "AFTER"}}
	for _, p := range d.Packages {
		t.add(changeOf(p.Before, p.After), p.Name, p.Before, p.After)
	}
	for _, f := range d.Files {
		t.add(f.Change, plain(f.Path), attrText(f.Before), attrText(f.After))
	}
	return t.write(w, "")
}

func changeOf(before, after string) string {
	switch {
	case before == "":
		return filediff.Added
	case after == "":
		return filediff.Removed
	}
	return filediff.Changed
}

func attrText(a *filediff.Attr) string {
	if a == nil {
		return ""
	}
	text := fmt.Sprintf("%s %d:%d", a.Mode, a.UID, a.GID)
	switch {
	case a.Target != "":
		return text + " -> " + plain(a.Target)
	case a.Size > 0:
		return text + " " + strconv.FormatInt(a.Size, 10)
	}
	return text
}

// showContents prints what an image has in packages, or a release's SBOM.
func (r *remote) showContents(cmd *cobra.Command, ref string, sbom bool) error {
	c, err := r.client()
	if err != nil {
		return err
	}
	if sbom {
		doc, err := c.SBOM(cmd.Context(), ref)
		if err != nil {
			return err
		}
		defer doc.Close()
		_, err = io.Copy(cmd.OutOrStdout(), doc)
		return err
	}
	all, err := c.Contents(cmd.Context(), ref)
	if err != nil {
		return err
	}
	return r.print(cmd, all, func(w io.Writer) error {
		for _, p := range all.Packages {
			if _, err := fmt.Fprintln(w, p); err != nil {
				return err
			}
		}
		return nil
	})
}
