package debian

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path"
)

// ReadPackage calls each with every file, link and folder of a package. Names have no leading slash.
func ReadPackage(ctx context.Context, deb string, each func(*tar.Header, io.Reader) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	archive := tar.NewReader(out)
	for {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			header.Name = path.Clean("/" + header.Name)[1:]
			err = each(header, archive)
		}
		if err != nil {
			cancel()
			cmd.Wait()
			return fmt.Errorf("%s: %w", path.Base(deb), err)
		}
	}
	io.Copy(io.Discard, out)
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("dpkg-deb %s: %w\n%s", path.Base(deb), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return nil
}
